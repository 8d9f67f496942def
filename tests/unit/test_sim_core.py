from elasticmoe_sim.core import Scheduler, next_token, seed_of


def test_tokens_depend_on_the_prompt_alone() -> None:
    first = [next_token(seed_of([1, 2, 3]), index) for index in range(20)]
    assert first == [next_token(seed_of([1, 2, 3]), index) for index in range(20)]
    assert first != [next_token(seed_of([1, 2, 4]), index) for index in range(20)]
    assert all(0 <= token < 512 and logprob < 0 for token, logprob in first)


def test_runs_as_many_requests_as_allowed_and_queues_the_rest() -> None:
    scheduler = Scheduler(max_running=2, kv_tokens=100)
    for name in "abc":
        scheduler.add(name, [1], max_tokens=2)
    assert scheduler.load() == (0, 3, 0.0)
    assert [(id, last) for id, _, _, last in scheduler.step()] == [("a", False), ("b", False)]
    assert scheduler.load() == (2, 1, 0.04)
    assert [last for _, _, _, last in scheduler.step()] == [True, True]
    assert [id for id, *_ in scheduler.step()] == ["c"]


def test_forgets_aborted_requests() -> None:
    scheduler = Scheduler(max_running=1, kv_tokens=100)
    for name in "abc":
        scheduler.add(name, [1], max_tokens=9)
    scheduler.step()
    scheduler.abort("b")
    assert scheduler.abort_all() == ["a", "c"]
    assert scheduler.step() == []
