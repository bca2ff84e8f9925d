"""One file per paper, named as the paper names its method; `wrapped` holds DSPy's own optimizers."""

from preceptor.teleprompters.ape import APE
from preceptor.teleprompters.wrapped import COPRO, GEPA, MIPROv2

__all__ = ["APE", "COPRO", "GEPA", "MIPROv2"]
