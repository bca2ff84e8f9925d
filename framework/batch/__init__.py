"""A program over a data set: streaming, resumable, every row answered once."""

from preceptor.batch.job import SHARD_ROWS, Batch
from preceptor.batch.reading import Source, open_source
from preceptor.batch.work import Progress, refuse_failures

__all__ = ["SHARD_ROWS", "Batch", "Progress", "Source", "open_source", "refuse_failures"]
