"""XLA's compiler options: only options that the installed XLA knows are passed, and only on their own platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.kernels.compat import known_options
from palladion.kernels.devices import cpu_compiler_options, gpu_compiler_options


def test_options_that_xla_does_not_know_are_left_out():
    known = {"xla_gpu_enable_command_buffer": "WHILE", "xla_cpu_prefer_vector_width": 256}
    unknown = {"xla_gpu_enable_command_buffers": "WHILE", "xla_gpu_graph_min_graph_size": "many"}
    assert known_options(**known, **unknown) == known
    assert known_options(xla_gpu_enable_command_buffer="LOOPS") == {}
    # Older versions of XLA recorded Triton kernels only with this option.
    assert known_options(legacy_command_buffer_custom_call_targets=gpu_compiler.TRITON_CALL) == {}


def test_each_platform_has_its_own():
    assert gpu_compiler_options() == {}
    assert cpu_compiler_options() != {}
    with gpu_compiler.tracing_for(90):
        assert gpu_compiler_options() == {"xla_gpu_enable_command_buffer": "WHILE"}
        assert cpu_compiler_options() == {}


def test_what_is_passed_compiles():
    with gpu_compiler.tracing_for(90):
        options = gpu_compiler_options()
    double = jax.jit(lambda x: 2 * x, compiler_options=options)
    assert double(jnp.float32(3)) == 6
