"""The operations: one public function each, and behind it the implementations that can run it.

Every operation is a folder: `api.py` (signature, contract, the table of implementations), `problem.py` (what was asked,
validated), `mosaic_tpu.py` and `triton.py` (one kernel each), `cases.py` (named workloads).
"""
