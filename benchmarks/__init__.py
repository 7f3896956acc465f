"""Measurements that README and docs quote; each is run from the root as python -m benchmarks.NAME."""
