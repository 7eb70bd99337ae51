"""What /proc/cpuinfo says that a processor is fast in."""

import pytest

from lora_nlu.ops.processor import has_fast_bf16


@pytest.mark.parametrize(
    "vendor, flags, is_fast",
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 fma", False),
        ("GenuineIntel", "avx512f avx512_vnni", False),
    ],
)
def test_bf16_is_fast_with_amx_or_on_amd_with_its_avx512_instructions(tmp_path, vendor, flags, is_fast):
    cpuinfo = tmp_path / "cpuinfo"
    assert not has_fast_bf16(cpuinfo)  # as where there is no /proc
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} arat\n")
    assert has_fast_bf16(cpuinfo) == is_fast
