"""One file per paper; the paper's name for its method is the file's name."""

from preceptor.teleprompters.ape import APE

__all__ = ["APE"]
