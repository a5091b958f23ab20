"""The table of several devices in a report, and their lines in a chat."""

from dataclasses import asdict, replace

from specchat.bench.tables import _devices
from specchat.records.usage import DeviceUse, MemoryReport
from specchat.ui.devices_view import use_lines
from specchat.units import GIB

USES = (
    DeviceUse("cuda:0", 8 * GIB, 7 * GIB, 7 * GIB, 3 * GIB, 1.5, 0.97, 0.412),
    DeviceUse("cuda:1", 6 * GIB, 5 * GIB, 5 * GIB, GIB, 0.5, 0.5, 0.2),
)
MEMORY = MemoryReport(8 * GIB, 7 * GIB, 7 * GIB, GIB, 0, 2, 2, 4 * GIB, devices=USES)


def test_reports_name_the_use_of_each_device():
    run = {"memory": {**asdict(MEMORY), "devices": [asdict(each) for each in USES]}}
    (table,) = _devices([{"memory": {}}, run])
    assert [row[:3] for row in table.rows] == [("cuda:0", "97%", "41%"), ("cuda:1", "50%", "20%")]
    assert table.rows[0][-1] == "7.0 GiB of 8.0 GiB"
    assert not _devices([run, {"memory": {"devices": []}}]) and not _devices([{"memory": {}}]) and not _devices([])


def test_chats_name_the_use_of_each_device():
    first, second = use_lines(MEMORY)
    assert first == "cuda:0: link busy 97% of the time, computing 41%, 3.0 GiB streamed, memory 7.0 GiB of 8.0 GiB"
    assert second.startswith("cuda:1: link busy 50%")
    far = replace(USES[0], device="far:7000 cpu", row_wait_s=2.5, sent_bytes=3 * GIB)
    (line,) = use_lines(replace(MEMORY, devices=(far,)))
    assert "3.0 GiB streamed, 3.0 GiB of rows sent, 2.50 s waited for rows, memory" in line
