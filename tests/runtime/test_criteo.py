import gzip
import math
import random
from pathlib import Path

import pytest
import torch

from gpp.runtime.criteo import Criteo
from gpp.runtime.data import DataError

SIZES = {"dense": 1, "features": 13, "tables": 26, "rows": 1000, "bag": 1}


def fields(seed: int) -> list[str]:
    draw = random.Random(seed)
    numbers = [
        "" if draw.random() < 0.2 else str(draw.randint(-3, 10 ** draw.randint(0, 9))) for _ in range(13)
    ]
    categories = ["" if draw.random() < 0.2 else f"{draw.getrandbits(32):08x}" for _ in range(26)]
    return [str(draw.randint(0, 1)), *numbers, *categories]


def write(path: Path, start: int, count: int) -> Path:
    path.write_text("".join("\t".join(fields(start + i)) + "\n" for i in range(count)))
    return path


def opened(*files: Path | str, **changes: int) -> Criteo:
    return Criteo(list(map(str, files)), **(SIZES | changes))


def test_a_line_is_a_sample(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "day_0", 0, 30))
    assert data.keys == ("dense_0", *(f"sparse_{i}" for i in range(26)), "label") and len(data) == 30
    order = [29, 3, 3, 0, 17]
    found = data.read(order, data.keys)
    for i, sample in enumerate(order):
        line = fields(sample)
        assert found["label"][i].item() == float(line[0])
        expected = [math.log1p(max(int(text or 0), 0)) for text in line[1:14]]
        torch.testing.assert_close(found["dense_0"][i], torch.tensor(expected))
        categories = [found[f"sparse_{j}"][i].tolist() for j in range(26)]
        assert categories == [[int(text or "0", 16) % 1000] for text in line[14:]]
    assert found["label"].dtype == torch.float32 and found["sparse_3"].dtype == torch.int64
    assert {key: tuple(value.shape) for key, value in data.read([], data.keys[-2:]).items()} == {
        "sparse_25": (0, 1), "label": (0,),
    }  # fmt: skip


def test_towers_and_bags_take_the_columns_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "day_0", 0, 9)
    whole = opened(path).read(range(9), opened(path).keys)
    data = opened(path, dense=3, features=4, tables=5, bag=2)
    found = data.read(range(9), data.keys)
    assert data.keys == (*(f"dense_{i}" for i in range(3)), *(f"sparse_{i}" for i in range(5)), "label")
    assert torch.equal(torch.cat([found[f"dense_{i}"] for i in range(3)], 1), whole["dense_0"][:, :12])
    bags = torch.cat([found[f"sparse_{i}"] for i in range(5)], 1)
    assert torch.equal(bags, torch.cat([whole[f"sparse_{i}"] for i in range(10)], 1))


def test_files_follow_each_other_and_patterns_count_as_numbers(tmp_path: Path) -> None:
    write(tmp_path / "day_2", 0, 5)
    write(tmp_path / "day_10", 5, 1)
    plain = write(tmp_path / "later", 6, 4)
    packed = tmp_path / "more.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    data = opened(f"{tmp_path}/day_*", packed)
    assert len(data) == 10
    order = [9, 0, 5, 4, 6]
    found = data.read(order, ("sparse_0", "label"))
    assert found["label"].tolist() == [float(fields(i)[0]) for i in order]
    assert found["sparse_0"].flatten().tolist() == [int(fields(i)[14] or "0", 16) % 1000 for i in order]
    one = Criteo(f"{tmp_path}/day_2", **SIZES)
    assert len(one) == 5


def test_only_the_columns_of_the_keys_are_parsed(tmp_path: Path) -> None:
    line = fields(0)
    line[20] = "no number"
    (tmp_path / "day_0").write_text("\t".join(line))
    data = opened(tmp_path / "day_0")
    assert data.read([0], ("sparse_5", "sparse_7", "dense_0", "label")).keys() >= {"label"}
    with pytest.raises(
        DataError, match=r"day_0, line 1: column 21 must be a hexadecimal .* it is 'no number'"
    ):
        data.read([0], ("sparse_6",))


@pytest.mark.parametrize(("column", "text", "key", "message"), [
    (0, "2", "label", r"column 1 must be 0 or 1, it is '2'"),
    (0, "", "label", r"column 1 must be 0 or 1, it is ''"),
    (0, "label", "label", r"column 1 must be a whole number, or empty, it is 'label'"),
    (5, "1.5", "dense_0", r"column 6 must be a whole number, or empty, it is '1.5'"),
    (39, "xyz", "sparse_25", r"column 40 must be a hexadecimal number of at most 8 digits, or empty"),
    (7, "1\t2", "label", r"it has 41 columns with tabs between them, it must have 40"),
])  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, column: int, text: str, key: str, message: str) -> None:
    first, second = write(tmp_path / "day_0", 0, 9), tmp_path / "day_1"
    line = fields(3)
    line[column] = text
    second.write_text("\n".join(["\t".join(fields(1)), "\t".join(line)]))
    data = opened(first, second)
    data.read(range(10), (key,))
    with pytest.raises(DataError, match=rf"day_1, line 2: {message}"):
        data.read([0, 10, 9], (key,))


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of Criteo's is named: data.files=\[day_0,day_1\]"):
        Criteo(None, **SIZES)
    with pytest.raises(DataError, match=r"no file has a name like .*day_\*"):
        opened(f"{tmp_path}/day_*")
    with pytest.raises(DataError, match=r"the file .*day_7 cannot be read"):
        opened(tmp_path / "day_7")
    path = write(tmp_path / "day_0", 0, 3)
    with pytest.raises(DataError, match=r"has 13 numbers, 7 towers of 4096 need 28672: use model.dense=1"):
        opened(path, dense=7, features=4096)
    with pytest.raises(DataError, match=r"has 26 categories, 7 bags of 100 need 700: use model.tables=26"):
        opened(path, tables=7, bag=100)
    with pytest.raises(DataError, match="rows 0"):
        opened(path, rows=0)
    with pytest.raises(DataError, match="no sample 3: it has 3"):
        opened(path).read([3], ("label",))
    with pytest.raises(DataError, match="no key 'dense_1'"):
        opened(path).read([0], ("dense_1",))
