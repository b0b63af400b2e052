"""The parts of ``tools/gpu_report.py``: what each measures, how it is run, and how the results are shown."""
