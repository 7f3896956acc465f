"""Losses come in, rows go out: one gradient per task and parameter. For optimizer/, guarantee/ and distributed/."""
