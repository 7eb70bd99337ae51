"""What the processor is fast in. Nothing here imports torch."""

from pathlib import Path


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:  # noqa: B008
    """Whether this processor multiplies faster in bf16 than in fp32: by AMX, or by AVX512-BF16 if it is AMD's.

    Intel's AVX512-BF16 without AMX is slower than fp32.
    """
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return False
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words
