"""Measurements that a person can believe: a fresh process each, interleaved, with their spread.

`harness.run_bench` is the entry. This file stays empty of imports because the worker, which runs on the device,
lives in this package: what it does not need must not be in its memory when memory is what it measures.
"""
