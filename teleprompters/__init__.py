"""Methods: one file per paper, named as the paper names its method; `wrapped` holds DSPy's own optimizers.

The other files are parts: of ConstitutionalExperts `amendments`; of InstructZero `coupled`; of the mixture `layout` and
`gates`; of `wrapped` `watched` and `asking`; of several methods `induction` and `reading`.
"""

from preceptor.teleprompters.ape import APE
from preceptor.teleprompters.constitutional_experts import ConstitutionalExperts
from preceptor.teleprompters.instruct_zero import InstructZero
from preceptor.teleprompters.mixture import MixtureOfExperts
from preceptor.teleprompters.protegi import ProTeGi
from preceptor.teleprompters.wrapped import COPRO, GEPA, MIPROv2

APO = ProTeGi
"""What the paper's code and others call it."""

__all__ = [
    "APE",
    "APO",
    "COPRO",
    "GEPA",
    "ConstitutionalExperts",
    "InstructZero",
    "MIPROv2",
    "MixtureOfExperts",
    "ProTeGi",
]
