"""Prompt programs, one per file."""

from preceptor.modules.classify import Classify
from preceptor.modules.experts import Experts
from preceptor.modules.generate import Generate

__all__ = ["Classify", "Experts", "Generate"]
