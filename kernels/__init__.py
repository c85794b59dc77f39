"""The operations: one public function each, and behind it the implementations that can run it.

Every operation is a folder: `api.py` (signature, contract, the table of implementations), `problem.py` (shapes and
options of a call, validated), `cases.py` (named workloads), and one folder per backend, `mosaic_tpu/` or `triton/`,
with `call.py` (block sizes, the call of the kernel) and `kernel.py`.
"""
