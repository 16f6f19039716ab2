"""Experience: what is written is read again, whoever dies, writes beside it, or cannot be reached."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from deltalake.exceptions import DeltaError
from paper_run import STRONG, PaperRun, grow

import esper
from esper.config import SimicConfig
from esper.simic import experience
from esper.simic.experience import Experience, ExperienceWriter, log_to
from esper.simic.moments import About
from esper.simic.reward import rewards
from esper.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path / "storage")


def write(storage, episode, *, about=None, rows_per_write=4, until=None, is_over=True):
    log = ExperienceWriter(storage, about or episode.about, SimicConfig(rows_per_write=rows_per_write))
    for moment in episode.moments[:until]:
        log.decided(moment.state, moment.packet, moment.signal)
    return log.close(episode.last, episode.ended, is_over=is_over)


def test_an_episode_comes_back_as_it_was(storage):
    episode = PaperRun().play(grow(STRONG, at=14))
    about = About(run_id="paper", policy="script", seed=3, tamiyo={"policy": "none"}, code="c0de")
    assert write(storage, episode, about=about) is None
    (found,) = Experience(storage).episodes()
    assert found.about == about
    assert (found.moments, found.last, found.ended) == (episode.moments, episode.last, episode.ended)
    assert found.is_over
    assert list(found.gains) == pytest.approx(rewards(episode, SimicConfig().reward))
    assert sum(found.gains) > 0.1


def test_an_episode_is_written_while_it_goes_on(storage):
    """What a killed run would have kept: all but the newest rows, and never a part of a row."""
    episode = PaperRun().play(grow(STRONG, at=14))
    log = ExperienceWriter(storage, episode.about, SimicConfig(rows_per_write=4))
    for moment in episode.moments:
        log.decided(moment.state, moment.packet, moment.signal)
        if log._thread is not None:
            log._thread.join()
    (open_one,) = Experience(storage).episodes(only_whole=False)
    assert list(Experience(storage).episodes()) == []
    assert len(open_one.moments) >= len(episode.moments) - 5
    assert open_one.moments == episode.moments[: len(open_one.moments)]
    assert log.close(episode.last, episode.ended, is_over=True) is None
    (whole,) = Experience(storage).episodes()
    assert whole.moments == episode.moments


def test_a_resumed_run_goes_on_with_its_episode(storage):
    """It does some epochs again: they count as it did them the second time."""
    first, second = (PaperRun(seed=seed).play(grow(STRONG, at=14)) for seed in (1, 2))
    write(storage, first, until=20, is_over=False)
    again = replace(second, moments=second.moments[15:])
    write(storage, again)
    (found,) = Experience(storage).episodes()
    assert found.moments == (*first.moments[:15], *second.moments[15:])
    assert found.is_over


def test_what_came_to_pass_before_a_run_was_resumed_is_not_counted_again(storage):
    episode = PaperRun().play(grow(STRONG, at=10))
    fossil = next(one.epoch for one in episode.moments if one.packet.ended)
    write(storage, episode, until=fossil + 3, is_over=False)
    write(storage, replace(episode, moments=episode.moments[fossil + 2 :]))
    (found,) = Experience(storage).episodes()
    assert found.moments == episode.moments
    assert sum(found.gains) == pytest.approx(sum(rewards(episode, SimicConfig().reward)), abs=0.02)


def test_rows_that_were_committed_twice_count_once(storage, monkeypatch):
    """A commit that reached the table and whose answer was lost is tried again."""
    real = experience.write_deltalake
    lost = []

    def unsure(*given, **named):
        real(*given, **named)
        if not lost:
            lost.append(True)
            raise DeltaError("the line broke")

    monkeypatch.setattr(experience, "write_deltalake", unsure)
    episode = PaperRun(num_epochs=6, num_sites=1).play(grow(STRONG, at=1))
    assert write(storage, episode) is None
    assert lost
    (found,) = Experience(storage).episodes()
    assert found.moments == episode.moments


def test_rows_that_are_lost_for_any_reason_are_said(storage, monkeypatch):
    def broken(*_):
        raise TypeError("no table of this")

    monkeypatch.setattr(experience, "_table_of", broken)
    problem = write(storage, PaperRun(num_epochs=5, num_sites=1).play(grow(STRONG, at=1)), rows_per_write=2)
    assert problem == "5 decisions of this run are not in the experience: no table of this"


def test_a_loop_of_ones_own_is_logged_where_it_says_so(storage):
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU())
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), body, torch.nn.Linear(12, 3))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    grown = esper.wrap(model, example=(x[:2],), sites=["1"])
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    with grown.session(
        optimizer=optimizer, val_data=(x, y), epochs=3, overrides=["tamiyo.policy=none"], experience=log_to(storage)
    ) as session:
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(grown(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step((x, y), loss)
            session.end_epoch()
    (episode,) = Experience(storage).episodes()
    assert [moment.epoch for moment in episode.moments] == [0, 1, 2]
    assert (episode.about.policy, episode.is_over) == ("none", True)


def test_runs_write_at_a_time(storage):
    """The table does not exist when they begin."""
    episode = PaperRun(num_epochs=6, num_sites=1).play(grow(STRONG, at=1))
    problems = []

    def run(i):
        problems.append(write(storage, episode, about=About(f"r{i}", "script"), rows_per_write=2))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [None] * 6
    found = list(Experience(storage).episodes())
    assert sorted(one.about.run_id for one in found) == [f"r{i}" for i in range(6)]
    assert all(one.moments == episode.moments for one in found)


def test_it_can_be_asked_for_some(storage):
    episode = PaperRun(num_epochs=4, num_sites=1).play(grow(STRONG, at=1))
    for run, policy in (("a", "heuristic"), ("b", "random"), ("c", "random")):
        write(storage, episode, about=About(run, policy))
    kept = Experience(storage)
    assert [one.about.run_id for one in kept.episodes(policies=["random"])] == ["b", "c"]
    assert [one.about.run_id for one in kept.episodes(runs=["a"])] == ["a"]
    assert kept.tidy().files_after == 1
    assert len(list(kept.episodes())) == 3


def test_no_experience_is_no_episode(storage):
    assert list(Experience(storage).episodes()) == []
    assert Experience(storage).tidy() is None


def test_a_storage_that_refuses_is_said_and_harms_nothing(tmp_path):
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "experience").write_text("a file where the table should be")
    episode = PaperRun(num_epochs=5, num_sites=1).play(grow(STRONG, at=1))
    problem = write(Storage.at(tmp_path / "storage"), episode, rows_per_write=2)
    assert problem is not None
    assert problem.startswith("5 decisions of this run are not in the experience: ")
