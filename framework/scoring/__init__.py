"""Scoring: metrics, evaluation over rows, paired statistics and racing."""
