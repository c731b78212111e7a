"""The benchmarks: one file per question, each runnable alone (`python -m bench NAME`). See bench/README.md."""
