"""The patch between two listings shows what changed and nothing else."""

from cpcompile.inspect.difference import difference

BEFORE = """# x = self.embed(ids)    model.py:4
embed: f32[1, 8, 4] = aten.embedding(embed.weight, ids)

# return x * 2    model.py:5
mul: f32[1, 8, 4] = aten.mul.Tensor(embed, 2)
return mul"""

AFTER = """# x = self.embed(ids)    model.py:4
shard_tokens: i64[1, 8] Sharded(1) = cp.shard_tokens(ids, 1)
embed: f32[1, 8, 4] Sharded(1) = aten.embedding(embed.weight, shard_tokens)

# return x * 2    model.py:5
mul: f32[1, 8, 4] Sharded(1) = aten.mul.Tensor(embed, 2)
return mul"""


def test_placements_alone_are_no_change() -> None:
    found = difference(BEFORE, AFTER, context=0)
    assert found == [
        "@@ x = self.embed(ids)    model.py:4",
        "- embed: f32[1, 8, 4] = aten.embedding(embed.weight, ids)",
        "+ shard_tokens: i64[1, 8] Sharded(1) = cp.shard_tokens(ids, 1)",
        "+ embed: f32[1, 8, 4] Sharded(1) = aten.embedding(embed.weight, shard_tokens)",
    ]


def test_nothing_changed() -> None:
    assert difference(BEFORE, BEFORE) == []
