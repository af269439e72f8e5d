"""The processor time that control groups allow, as the files of many systems say it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from doge_onnx.runtime.engine.control_groups import processor_quota

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)
SERVICE = "system.slice/app.service"
POD = "kubepods.slice/kubepods-burstable.slice/pod1/container1"


def v1(quota: int, period: int = 100000) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{quota}", "cpu.cfs_period_us": f"{period}"}


def v2(words: str) -> dict[str, str]:
    return {"cpu.max": words}


def system(root: Path, own: str, mounts: str, groups: dict[str, dict[str, str]]) -> Path:
    """The files of a system.

    Args:
        root: Where they are written.
        own: /proc/self/cgroup.
        mounts: /proc/self/mountinfo.
        groups: The files of each group, by the group's directory below /sys/fs/cgroup.
    """
    files = {"proc/self/cgroup": own, "proc/self/mountinfo": mounts}
    for group, contents in groups.items():
        files |= {f"sys/fs/cgroup/{group}/{name}": text for name, text in contents.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("own", "mounts", "groups", "expected"),
    [
        # A container that sees its own group as the root.
        ("0::/", V2, {"": v2("150000 100000")}, 1.5),
        ("4:cpu,cpuacct:/", V1, {"cpu,cpuacct": v1(150000)}, 1.5),
        # systemd's CPUQuota, of a service or of the slice around it.
        (f"0::/{SERVICE}", V2, {SERVICE: v2("200000 100000")}, 2),
        (f"0::/{SERVICE}", V2, {SERVICE: v2("max 100000"), "system.slice": v2("30000 10000")}, 3),
        (f"4:cpu,cpuacct:/{SERVICE}", V1, {f"cpu,cpuacct/{SERVICE}": v1(50000)}, 0.5),
        # The lowest of all that are around it, wherever it stands.
        (
            f"0::/{POD}",
            V2,
            {
                "kubepods.slice": v2("800000 100000"),
                "kubepods.slice/kubepods-burstable.slice": v2("100000 100000"),
                POD: v2("400000 100000"),
            },
            1,
        ),
        # Groups beside it are not its own.
        (f"0::/{SERVICE}", V2, {"system.slice/other.service": v2("10000 100000")}, math.inf),
        # A container that sees the host's paths, but only its own group.
        (
            f"4:cpu,cpuacct:/{POD}/inner",
            V1.replace("0:28 / ", f"0:28 /{POD} "),
            {"cpu,cpuacct": v1(300000), "cpu,cpuacct/inner": v1(250000)},
            2.5,
        ),
        (f"0::/{POD}", V2, {"": v2("300000 100000")}, 3),
        # A group outside of what the process may see.
        ("0::/../other", V2, {"": v2("300000 100000"), "other": v2("1 100000")}, 3),
        # Both versions, of which the first has the controller.
        (
            "2:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/c",
            V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            {"cpu,cpuacct/a": v1(200000), "cpu,cpuacct/b": v1(100000), "unified/c": {}},
            2,
        ),
        # Names with a colon, and a mount with a blank.
        ("0::/a:b", V2, {"a:b": v2("200000 100000")}, 2),
        ("0::/a", V2.replace("/cgroup ", "/cgroup/x\\040y "), {"x y/a": v2("200000 100000")}, 2),
        # No limit, and what is none.
        (f"0::/{SERVICE}", V2, {SERVICE: v2("max 100000")}, math.inf),
        ("4:cpu,cpuacct:/", V1, {"cpu,cpuacct": v1(-1)}, math.inf),
        ("4:cpu,cpuacct:/", V1, {"cpu,cpuacct": v1(100000, 0)}, math.inf),
        ("3:memory:/a", V1, {"memory/a": v1(100000)}, math.inf),
        ("0::/", V2, {"": v2("")}, math.inf),
        ("0::/", V2, {"": v2("a b")}, math.inf),
        ("", "", {}, math.inf),
        ("nonsense", "nonsense\n - \n1 2 3 4 5 - cgroup2", {"": v2("1 1")}, math.inf),
    ],
)
def test_the_lowest_limit_of_all_groups_counts(tmp_path, own, mounts, groups, expected):
    assert processor_quota(system(tmp_path, own, mounts, groups)) == expected


def test_a_system_without_control_groups_sets_no_limit(tmp_path):
    assert processor_quota(tmp_path) == math.inf


def test_names_need_not_be_text(tmp_path):
    root = system(tmp_path, "", V2, {"": v2("200000 100000")})
    (root / "proc/self/cgroup").write_bytes(b"0::/\xff\xfe\n")
    assert processor_quota(root) == 2


def test_the_name_of_a_group_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path):
    root = system(tmp_path, "0::/a\x0bb", V2, {"a\x0bb": v2("150000 100000")})
    assert processor_quota(root) == 1.5
