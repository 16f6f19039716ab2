"""Every store of policies keeps the same promises: in memory, below a directory, on S3."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.numpy

from esper.leyline import ConflictError, DataError, NotFoundError, PolicyCard, TamperedError
from esper.leyline.policies import PROMOTED, PolicyStore, find_policy
from esper.storage import Storage
from esper.urza.policies import MemoryPolicies, StoredPolicies


def weights(value: float = 1.0) -> bytes:
    return safetensors.numpy.save({"head.weight": np.full((2, 3), value, dtype=np.float32)})


def card(data: bytes, **fields) -> PolicyCard:
    return PolicyCard.of(data, **{"name": "digits", "observation_version": 1, "shape": {"hidden": 8}, **fields})


@pytest.fixture(params=["directory", "s3"])
def storage(request, tmp_path) -> Storage:
    if request.param == "directory":
        return Storage.at(tmp_path / "store")
    return Storage.at(f"s3://bucket/{tmp_path.name}", request.getfixturevalue("s3_options"))


@pytest.fixture(params=["memory", "directory", "s3"])
def store(request, tmp_path) -> PolicyStore:
    if request.param == "memory":
        return MemoryPolicies()
    if request.param == "directory":
        return StoredPolicies(Storage.at(tmp_path / "store"))
    return StoredPolicies(Storage.at(f"s3://bucket/{tmp_path.name}", request.getfixturevalue("s3_options")))


class TestEveryStore:
    def test_what_is_put_is_got_as_it_was(self, store):
        mine = card(weights(), results=({"task": "digits", "gain": 0.1},), parents=("imitation of heuristic",))
        assert store.put(mine, weights()) == mine.version
        assert store.put(mine, weights()) == mine.version
        assert store.get(mine.version) == (mine, weights())
        assert store.ls() == [mine]

    def test_an_empty_store_has_nothing(self, store):
        assert (store.ls(), store.promoted()) == ([], None)
        for name in ("0" * 64, "../secret", ""):
            with pytest.raises(NotFoundError):
                store.get(name)

    def test_the_version_is_that_of_weights_and_shape_alone(self, store):
        first = card(weights(), name="one", notes="before the exam", created_at=1.0)
        others = [
            card(weights(2.0)),
            card(weights(), shape={"hidden": 9}),
            card(weights(), observation_version=2),
            card(weights(), kind="mlp"),
        ]
        assert len({first.version, *(other.version for other in others)}) == 5
        later = card(weights(), name="two", notes="after it", created_at=2.0)
        assert later.version == first.version
        store.put(first, weights())
        store.put(later, weights())
        assert store.ls() == [later]

    def test_cards_come_oldest_first(self, store):
        cards = [card(weights(i), created_at=float(i)) for i in (3, 1, 2)]
        for one in cards:
            store.put(one, weights(one.created_at))
        assert [one.created_at for one in store.ls()] == [1.0, 2.0, 3.0]

    def test_what_does_not_belong_together_is_refused(self, store):
        with pytest.raises(TamperedError, match="not of these weights"):
            store.put(card(weights()), weights(2.0))
        with pytest.raises(DataError, match="no safetensors"):
            store.put(card(b"pickle"), b"pickle")
        assert store.ls() == []

    def test_only_what_is_there_is_promoted(self, store):
        first, second = card(weights(1.0)), card(weights(2.0))
        store.put(first, weights(1.0))
        store.promote(first.version)
        with pytest.raises(NotFoundError):
            store.promote(second.version)
        assert store.promoted() == first.version
        store.put(second, weights(2.0))
        store.promote(second.version)
        assert store.promoted() == second.version

    def test_only_what_is_there_is_nominated_and_that_can_be_taken_back(self, store):
        assert store.nominated() is None
        with pytest.raises(NotFoundError):
            store.nominate("0" * 64)
        mine = card(weights())
        store.put(mine, weights())
        store.nominate(mine.version)
        assert (store.nominated(), store.promoted()) == (mine.version, None)
        store.nominate(None)
        assert store.nominated() is None

    def test_a_policy_is_found_by_as_much_of_its_version_as_is_its_own(self, store):
        cards = [card(weights(float(i))) for i in range(17)]  # two of them begin with the same digit
        for i, one in enumerate(cards):
            store.put(one, weights(float(i)))
        assert find_policy(store, cards[0].version) == cards[0].version
        digits = [one.version[0] for one in cards]
        shared = next(digit for digit in digits if digits.count(digit) > 1)
        with pytest.raises(ConflictError, match=f"begin with '{shared}'"):
            find_policy(store, shared)
        for nothing in ("xyz", ""):
            with pytest.raises(NotFoundError, match="there is no policy"):
                find_policy(store, nothing)
        with pytest.raises(NotFoundError, match="no policy was promoted"):
            find_policy(store, PROMOTED)
        store.promote(cards[3].version)
        assert find_policy(store, PROMOTED) == cards[3].version


def test_a_shape_that_is_no_json_has_no_version():
    with pytest.raises(ValueError, match="JSON"):
        card(weights(), shape={"dropout": math.nan})


class TestDamage:
    """What a crash or a hand did to the files is found, whatever it was."""

    @pytest.fixture
    def mine(self, storage):
        mine = card(weights(), notes="as written")
        StoredPolicies(storage).put(mine, weights())
        return mine

    def test_every_torn_file_is_refused(self, storage, mine):
        store = StoredPolicies(storage)
        for name in ("weights.safetensors", "card.json"):
            path = f"policies/{mine.version}/{name}"
            whole = storage.read(path)
            for length in (0, 1, len(whole) // 2, len(whole) - 1):
                storage.write(path, whole[:length])
                with pytest.raises(TamperedError, match=mine.version):
                    store.get(mine.version)
                with pytest.raises(TamperedError):
                    store.promote(mine.version)
            storage.write(path, whole)
            assert store.get(mine.version) == (mine, weights())

    def test_changed_weights_are_refused(self, storage, mine):
        storage.write(f"policies/{mine.version}/weights.safetensors", weights(9.0))
        with pytest.raises(TamperedError, match="are not its own"):
            StoredPolicies(storage).get(mine.version)

    @pytest.mark.parametrize(
        "change", [{"notes": "better than it is"}, {"shape": {"hidden": 9}}, {"version": "0" * 64}]
    )
    def test_a_changed_card_is_refused_and_left_out(self, storage, mine, change, caplog):
        path = f"policies/{mine.version}/card.json"
        sealed = json.loads(storage.read(path))
        sealed["body"] |= change
        storage.write(path, json.dumps(sealed).encode())
        store = StoredPolicies(storage)
        with pytest.raises(TamperedError, match="other bytes"):
            store.get(mine.version)
        assert store.ls() == []
        assert [record.message for record in caplog.records] == ["policy.card.refused"]
        store.put(mine, weights())  # putting it again mends it
        assert store.get(mine.version) == (mine, weights())

    def test_a_card_of_another_policy_is_refused(self, storage, mine):
        other = card(weights(2.0))
        store = StoredPolicies(storage)
        store.put(other, weights(2.0))
        storage.write(f"policies/{mine.version}/card.json", storage.read(f"policies/{other.version}/card.json"))
        with pytest.raises(TamperedError, match="another policy"):
            store.get(mine.version)

    def test_weights_that_are_gone_are_missed(self, storage, mine):
        storage.remove(f"policies/{mine.version}/weights.safetensors")
        with pytest.raises(TamperedError, match="has no weights"):
            StoredPolicies(storage).get(mine.version)

    def test_a_policy_without_its_card_is_not_there_yet(self, storage, mine):
        storage.remove(f"policies/{mine.version}/card.json")
        store = StoredPolicies(storage)
        assert store.ls() == []
        with pytest.raises(NotFoundError, match="there is no policy"):
            store.get(mine.version)

    def test_a_torn_note_of_the_promoted_one_is_refused_and_mended_by_the_next(self, storage, mine):
        store = StoredPolicies(storage)
        store.promote(mine.version)
        storage.write("policies/promoted", storage.read("policies/promoted")[:-3])
        with pytest.raises(TamperedError, match="is torn"):
            store.promoted()
        store.promote(mine.version)
        assert store.promoted() == mine.version
