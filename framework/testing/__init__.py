"""Stand-ins for language models, public so that new methods are tested the same way.

In this process, as engines behind a real `dspy.LM`:

    lm = scripted(["yes", "no"])                   # answers from a list, fails when asked once too often
    lm = simulated(lambda request: "yes")          # answers by a function
    lm = coin_flip(["yes", "no"])                  # no instruction can help
    lm = graded(truth, {"Judge the mood.": 0.9})   # the true accuracy of each instruction is known

Behind HTTP, on the loopback interface, with faults that can be switched on:

    with ChatServer(lambda body: "yes", faults=Faults(share=0.1, kinds=("rate_limit", "hang"))) as server:
        lm = server.lm("any-name", max_tokens=16)
"""

from preceptor.testing.faults import KINDS, Faults, Kind
from preceptor.testing.models import Simulated, asked, coin_flip, graded, prompt, scripted, simulated, system
from preceptor.testing.server import ChatServer, Received

__all__ = [
    "KINDS",
    "ChatServer",
    "Faults",
    "Kind",
    "Received",
    "Simulated",
    "asked",
    "coin_flip",
    "graded",
    "prompt",
    "scripted",
    "simulated",
    "system",
]
