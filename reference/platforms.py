"""The platform that a function is traced for."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """Returns the platform that is being traced for: "cpu", "gpu" or "tpu".

    It is that of the current abstract mesh where the mesh names a device (as when compiling for a chip that is not
    there), otherwise that of JAX's default device or backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform: str | None = None if device is None else device.platform
    if platform is None and (default := jax.config.jax_default_device) is not None:  # type: ignore[attr-defined]
        platform = default if isinstance(default, str) else default.platform
    return platform_kind(platform or jax.default_backend())


def platform_kind(platform: str) -> str:
    """Returns "gpu" for the platforms that are GPUs to JAX, "cuda" and "rocm", and others by their own names."""
    return "gpu" if platform in ("cuda", "rocm") else platform
