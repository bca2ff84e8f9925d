"""The demo task: support tickets of our own, to be routed to six queues (README.md has the policy)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
SIGNATURE: Final = "text -> queue: Literal['bell', 'bench', 'desk', 'dock', 'door', 'vault']"
INSTRUCTIONS: Final = "Route the support ticket to the right queue."
"""What a busy engineer would write."""
