"""The measurements behind the figures in the docs, one command a file; see README.md beside this file."""
