"""The scorer alone, and as a stage of data libraries. Every way gives the bits of ScorePairs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_ROWS, PLAIN_ROWS, ROWS, Server, check_scores, scores

from bradley import AsyncClient, Client, NotFoundError, Scorer
from bradley.forked import NewPython
from bradley.scorer import ANSWER_COLUMNS, PAIR_COLUMNS
from bradley.v1 import scoring_pb2

Scores = Sequence[scoring_pb2.PairScore]
# Chat messages of a typed table: keys that a message lacks are null.
TYPED_ROWS = [
    {
        **row,
        "prompt": [{"name": None, **message} for message in row["prompt"]],
    }
    for row in CHAT_ROWS
]


@pytest.fixture
def scorer(server: Server, policy: str) -> Iterator[Scorer]:
    with Scorer(server.target, policy, pairs_per_call=8) as made:
        yield made


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    names, count = list(columns), len(next(iter(columns.values())))
    return [{name: columns[name][i] for name in names} for i in range(count)]


def test_a_dict_of_lists(scorer: Scorer, plain_scores: Scores) -> None:
    scored = scorer(columns_of(PLAIN_ROWS))
    check_scores(rows_of(scored), plain_scores)
    assert scored["id"] == [row["id"] for row in PLAIN_ROWS]
    assert all(type(value) is float for value in scored["probability"])


def test_arrays_frames_and_tables(scorer: Scorer, plain_scores: Scores) -> None:
    numpy = pytest.importorskip("numpy")
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    arrays = {k: numpy.array(v, dtype=object) for k, v in columns_of(PLAIN_ROWS).items()}
    scored = scorer(arrays)
    assert scored["probability"].dtype == numpy.float64
    check_scores(rows_of(scored), plain_scores)
    frame = pandas.DataFrame(PLAIN_ROWS, index=range(7, 47))
    scored = scorer(frame)
    assert list(scored.index) == list(frame.index)
    assert list(frame.columns) == ["id", "prompt", "chosen", "rejected"], "the input is unchanged"
    check_scores(scored.to_dict("records"), plain_scores)
    table = pyarrow.Table.from_pylist(PLAIN_ROWS)
    scored = scorer(table)
    assert scored.schema.field("error").type == pyarrow.string()
    check_scores(scored.to_pylist(), plain_scores)
    check_scores(
        [row for part in scorer.pandas([frame]) for row in part.to_dict("records")], plain_scores
    )
    batches = [
        row for b in scorer.arrow(table.to_batches(max_chunksize=7)) for row in b.to_pylist()
    ]
    check_scores(batches, plain_scores)


def test_messages_in_tables(scorer: Scorer, client: Client, policy: str) -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    expected = scores(client, CHAT_ROWS, policy)
    table = pyarrow.Table.from_pylist(TYPED_ROWS)
    check_scores(scorer(table).to_pylist(), expected)
    # Parquet files come back with arrays of messages.
    check_scores(scorer(table.to_pandas()).to_dict("records"), expected)
    check_scores(scorer(pandas.DataFrame(TYPED_ROWS)).to_dict("records"), expected)
    check_scores(scorer.rows(TYPED_ROWS), expected)


def test_a_scorer_is_pickled_without_its_connection(
    scorer: Scorer, plain_scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRADLEY_TOKEN", "secret-token")
    scorer(columns_of(PLAIN_ROWS[:1]))
    state = pickle.dumps(scorer)
    assert b"secret-token" not in state
    check_scores(rows_of(pickle.loads(state)(columns_of(PLAIN_ROWS))), plain_scores)
    # A closed scorer connects again.
    scorer.close()
    check_scores(rows_of(scorer(columns_of(PLAIN_ROWS))), plain_scores)


def test_threads_share_a_scorer(scorer: Scorer, plain_scores: Scores) -> None:
    found: list[Any] = [None] * 4

    def score(i: int) -> None:
        found[i] = rows_of(scorer(columns_of(PLAIN_ROWS)))

    threads = [threading.Thread(target=score, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rows in found:
        check_scores(rows, plain_scores)


def test_lists_of_answers_have_the_pair_with_the_lowest_margin(
    server: Server, client: Client, policy: str
) -> None:
    pandas = pytest.importorskip("pandas")
    plain = PLAIN_ROWS[0]
    rejected = [" No.", " It depends on many things.", " Ask me later, or never."]
    dialogue = CHAT_ROWS[0]
    replies = [dialogue["rejected"], CHAT_ROWS[1]["rejected"]]
    rows: list[dict[str, Any]] = [
        {**plain, "rejected": rejected},
        {**plain, "chosen": [plain["chosen"], " Yes."], "rejected": rejected[:2]},
        {**dialogue, "rejected": replies},
        # A list of one answer, and one answer that is a list of messages.
        {**plain, "rejected": rejected[:1]},
        dialogue,
        {**plain, "rejected": [rejected[0], 7]},
        {**plain, "rejected": [rejected[0], [{"role": "assistant", "content": "x"}]]},
        {**dialogue, "rejected": [replies[0], [{"x": 1}]]},
    ]

    def expected(row: dict[str, Any], chosen: list[Any], others: list[Any]) -> tuple[float, int]:
        pairs = [{**row, "chosen": c, "rejected": r} for c in chosen for r in others]
        margins = [score.margin for score in scores(client, pairs, policy)]
        return min(margins), margins.index(min(margins)) + 1

    with Scorer(server.target, policy, output="all", pairs_per_call=2) as scorer:
        for found in (
            scorer.rows(rows),
            scorer(pandas.DataFrame(rows)).astype(object).to_dict("records"),
        ):
            lowest = [(row["margin"], row["pair"]) for row in found]
            assert lowest[0] == expected(plain, [plain["chosen"]], rejected)
            assert lowest[1] == expected(plain, [plain["chosen"], " Yes."], rejected[:2])
            assert lowest[2] == expected(dialogue, [dialogue["chosen"]], replies)
            for i, row in ((3, {**plain, "rejected": rejected[0]}), (4, dialogue)):
                [score] = scores(client, [row], policy)
                assert lowest[i][0] == score.margin
                assert lowest[i][1] is None or lowest[i][1] != lowest[i][1], "NaN in pandas"
            errors = [row["error"] for row in found]
            assert errors[:5] == [None] * 5
            mixed = "rejected: mixes texts and lists of messages; use one form for all answers"
            assert errors[5:7] == [mixed, mixed]
            assert errors[7].startswith("pair 2: INVALID_ARGUMENT"), errors


def test_bad_rows_stay_with_an_error(scorer: Scorer, plain_scores: Scores) -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    rows: list[dict[str, Any]] = [dict(row) for row in PLAIN_ROWS[:6]]
    rows[1]["chosen"] = None
    rows[2]["prompt"] = None
    mixed = [*rows, {**CHAT_ROWS[0], "chosen": "Paris."}, {**CHAT_ROWS[0], "prompt": [{"x": 1}]}]
    mixed.append({**PLAIN_ROWS[0], "prompt": 7})
    mixed.append({**CHAT_ROWS[0], "images": [b"png"]})
    mixed.append({**PLAIN_ROWS[0], "system": "Be brief."})
    scored = scorer.rows(mixed)
    assert [row["id"] for row in scored] == [row["id"] for row in mixed]
    errors = [row["error"] for row in scored]
    assert errors[1] == "chosen: is missing"
    assert errors[2] == "prompt: is missing"
    assert errors[6] == "chosen: give texts or lists of messages for both the prompt and chosen"
    assert errors[7].startswith("INVALID_ARGUMENT"), errors
    assert errors[8] == "chosen: give texts or lists of messages for both the prompt and chosen"
    assert errors[9] == "images: cannot be used, because models here see text only"
    assert errors[10] == "system: needs a dialogue; make the prompt a list of messages"
    assert [row["probability"] is None for row in scored] == [e is not None for e in errors]
    good = [0, 3, 4, 5]
    check_scores([scored[i] for i in good], [plain_scores[i] for i in good])
    # In typed tables, a missing score is null, and NaN in numpy and pandas.
    table = scorer(pyarrow.Table.from_pylist(rows)).to_pylist()
    assert [row["probability"] is None for row in table] == [i not in good for i in range(6)]
    frame = scorer(pandas.DataFrame(rows))
    assert list(frame["probability"].isna()) == [i not in good for i in range(6)]
    check_scores(
        [row for i, row in enumerate(frame.to_dict("records")) if i in good],
        [plain_scores[i] for i in good],
    )
    assert scorer({name: [] for name in rows[0]})["error"] == []


def test_errors_of_every_row_are_raised(server: Server, scorer: Scorer) -> None:
    batch = columns_of(PLAIN_ROWS)
    with pytest.raises(NotFoundError):
        Scorer(server.target, "models/none")(batch)
    with pytest.raises(ValueError, match=r"no column 'chosen', only better.* chosen=…"):
        scorer({"better": ["x"]})
    with pytest.raises(ValueError, match=r"already has the columns probability, .*prefix=…"):
        scorer(scorer(batch))
    with pytest.raises(TypeError, match="int is no batch"):
        scorer(7)
    with pytest.raises(ValueError, match="output has quality"):
        Scorer(server.target, "tiny", output=["quality"])
    with pytest.raises(ValueError, match="policy is missing"):
        Scorer(server.target)


def test_columns_have_the_chosen_names(server: Server, policy: str, plain_scores: Scores) -> None:
    scorer = Scorer(
        server.target, policy, prompt="q", chosen="a", rejected="b", output="all", prefix="s_"
    )
    names = {"id": "id", "prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [{names[key]: value for key, value in row.items()} for row in PLAIN_ROWS]
    scored = scorer.rows(rows)
    assert set(scored[0]) == {*rows[0], *("s_" + name for name in PAIR_COLUMNS)}
    for row, score in zip(scored, plain_scores, strict=True):
        assert row["s_policy_version"] == policy
        for side, answer in (("chosen", score.a), ("rejected", score.b)):
            for name in ("reward", "policy_logprob", "reference_logprob", "tokens", "truncated"):
                assert row[f"s_{side}_{name}"] == getattr(answer, name)
    types = [f"`s_{name}` {column.sql}" for name, column in PAIR_COLUMNS.items()]
    assert ", ".join(types) in scorer.ddl


def test_options_reach_the_server(server: Server, client: Client, policy: str) -> None:
    settings: dict[str, Any] = {"beta": 0.7, "max_length": 160, "normalization": "mean"}
    expected = client.score_pairs(ROWS, policy, reference="tiny", **settings).results
    scorer = Scorer(server.target, policy, reference="tiny", **settings)
    check_scores(scorer.rows(ROWS), [result.score for result in expected])


def test_logged_log_probs_are_columns(server: Server, client: Client, policy: str) -> None:
    found = scores(client, PLAIN_ROWS[:4], policy)
    rows: list[dict[str, Any]] = [
        {
            **row,
            "ref_chosen_logps": score.a.reference_logprob,
            "ref_rejected_logps": score.b.reference_logprob,
        }
        for row, score in zip(PLAIN_ROWS, found, strict=False)
    ]
    texts = [" No.", " It depends on many things."]
    pairs = [{**PLAIN_ROWS[0], "rejected": text} for text in texts]
    of_pairs = scores(client, pairs, policy)
    several: dict[str, Any] = {
        **PLAIN_ROWS[0],
        "rejected": texts,
        "ref_chosen_logps": of_pairs[0].a.reference_logprob,
        "ref_rejected_logps": [score.b.reference_logprob for score in of_pairs],
    }
    with Scorer(server.target, policy, logged="reference") as scorer:
        check_scores(scorer.rows(rows), found)
        check_scores(rows_of(scorer(columns_of(rows))), found)
        scored = scorer.rows(
            [
                several,
                {**several, "ref_rejected_logps": -1.0},
                {**several, "ref_chosen_logps": [-1.0, -2.0]},
                {**rows[0], "ref_chosen_logps": None},
            ]
        )
        assert scored[0]["margin"] == min(score.margin for score in of_pairs)
        errors = [row["error"] for row in scored]
        one_for_two = "ref_rejected_logps: give a list with one number for each of the 2 answers"
        assert errors[:2] == [None, one_for_two]
        assert errors[2].startswith("ref_chosen_logps: is list; give one number for the answer")
        assert errors[3].startswith("ref_chosen_logps: is missing")
        with pytest.raises(ValueError, match="no column 'ref_chosen_logps', which logged='ref"):
            scorer(columns_of(PLAIN_ROWS))
    with pytest.raises(ValueError, match="logged is for pairs only"):
        Scorer(server.target, policy, completions="answers", logged="both")
    with pytest.raises(ValueError, match="logged is 'policy': it must be reference or both"):
        Scorer(server.target, policy, logged="policy")


def test_answers_are_scored(server: Server, client: Client, policy: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "answers": [row["rejected"], row["chosen"], " 7"]}
        for row in PLAIN_ROWS[:10]
    ]
    scorer = Scorer(server.target, policy, completions="answers", output="all")
    scored = scorer.rows([*rows, {"prompt": "x", "answers": None}, {"prompt": "x", "answers": []}])
    assert set(ANSWER_COLUMNS) <= set(scored[0])
    for row, given in zip(scored, rows, strict=False):
        expected = client.score_completions(given["prompt"], given["answers"], policy)
        assert row["rewards"] == [result.score.reward for result in expected.results]
        assert row["probabilities"] == [result.probability for result in expected.results]
        assert row["ranking"] == list(expected.ranking)
        assert row["best"] == row["ranking"][0]
        assert row["error"] is None
    assert scored[10]["error"] == "completions: is missing"
    assert scored[11]["error"].startswith("INVALID_ARGUMENT")
    table = scorer(pyarrow.Table.from_pylist(rows))
    assert table.schema.field("rewards").type == pyarrow.list_(pyarrow.float64())
    assert table["rewards"].to_pylist() == [row["rewards"] for row in scored[:10]]


def test_datasets_map(scorer: Scorer, client: Client, policy: str, plain_scores: Scores) -> None:
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_list(PLAIN_ROWS)
    # The scorer has a connection already when `map` forks.
    check_scores(list(plain.map(scorer, batched=True, batch_size=32)), plain_scores)
    check_scores(list(plain.map(scorer, batched=True, batch_size=9, num_proc=2)), plain_scores)
    chat = datasets.Dataset.from_list(TYPED_ROWS)
    scored = chat.map(scorer, batched=True, batch_size=2)
    check_scores(list(scored), scores(client, CHAT_ROWS, policy))


async def _open_client(server: Server, policy: str) -> AsyncClient:
    client = AsyncClient(server.target)
    await client.score_pairs(PLAIN_ROWS[:1], policy)
    return client


def _killed_and_scored(scorer: Scorer) -> list[dict[str, Any]]:
    """Scores in a forked process, before and after its Python is killed."""
    before = scorer.rows(PLAIN_ROWS[:2])
    live = scorer._live
    assert isinstance(live, NewPython)
    os.kill(live._child.pid, signal.SIGKILL)
    live._child.wait()
    assert scorer.rows(PLAIN_ROWS[:2]) == before
    return before


def test_forked_processes(server: Server, scorer: Scorer, policy: str) -> None:
    scorer.rows(PLAIN_ROWS[:1])
    loop = asyncio.new_event_loop()
    # Its thread waits in gRPC all the time, and gRPC's handlers of forks then do nothing.
    client = loop.run_until_complete(_open_client(server, policy))
    expected = [scorer.rows([row])[0] for row in PLAIN_ROWS]
    done = threading.Event()

    def call() -> None:
        with Scorer(server.target, policy) as other:
            while not done.is_set():
                other.rows(PLAIN_ROWS)

    # Other calls are in progress while the processes are forked.
    caller = threading.Thread(target=call)
    caller.start()
    fork = multiprocessing.get_context("fork")
    try:
        # This executor notices a process that dies, which a Pool replaces.
        with concurrent.futures.ProcessPoolExecutor(3, fork) as executor:
            chunks = [PLAIN_ROWS[i : i + 4] for i in range(0, len(PLAIN_ROWS), 4)]
            scored = executor.map(scorer.rows, chunks, timeout=60)
            assert [row for rows in scored for row in rows] == expected
            bad = Scorer(server.target, "models/none")
            with pytest.raises(NotFoundError, match="models/none"):
                executor.submit(bad.rows, PLAIN_ROWS[:1]).result(60)
            assert executor.submit(_killed_and_scored, scorer).result(60) == expected[:2]
    finally:
        done.set()
        caller.join()
        loop.run_until_complete(client.close())
        loop.close()


@pytest.fixture(scope="module")
def ray_data() -> Iterator[Any]:
    """Ray Data on a cluster of this machine."""
    ray = pytest.importorskip("ray")
    data = pytest.importorskip("ray.data")
    # A short path, because its sockets lie there.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    # Ray gives its workers little of a busy machine otherwise.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100_000_000,
        _temp_dir=folder,
    )
    yield data
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_ray_data(ray_data: Any, server: Server, policy: str, plain_scores: Scores) -> None:
    # A bad row, so that one block has errors and the others have none.
    bad = {**PLAIN_ROWS[0], "id": "bad", "chosen": None}
    pairs = ray_data.from_items([*PLAIN_ROWS, bad], override_num_blocks=4)
    for batch_format in ("numpy", "pyarrow"):
        scored = pairs.map_batches(
            Scorer,
            fn_constructor_args=(server.target, policy),
            batch_size=16,
            batch_format=batch_format,
            concurrency=2,
            num_cpus=0.1,
        ).take_all()
        by_id = {row["id"]: row for row in scored}
        assert by_id["bad"]["error"] == "chosen: is missing"
        check_scores([by_id[row["id"]] for row in PLAIN_ROWS], plain_scores)


def test_daft(scorer: Scorer, client: Client, policy: str, plain_scores: Scores) -> None:
    daft = pytest.importorskip("daft")
    for rows, expected in (
        (PLAIN_ROWS, plain_scores),
        (CHAT_ROWS, scores(client, CHAT_ROWS, policy)),
    ):
        frame = daft.from_pylist(rows)
        columns = (daft.col("prompt"), daft.col("chosen"), daft.col("rejected"))
        scored = frame.with_column("score", scorer.daft(*columns)).to_pylist()
        check_scores([row["score"] for row in scored], expected)
    with pytest.raises(ValueError, match="1 expressions are given"):
        scorer.daft(daft.col("prompt"))


def test_spark(scorer: Scorer, plain_scores: Scores) -> None:
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    if shutil.which("java") is None:
        pytest.skip("no JVM is installed")
    spark = (
        sql.SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    try:
        pairs = spark.createDataFrame(
            PLAIN_ROWS, "id string, prompt string, chosen string, rejected string"
        )
        schema = f"id string, prompt string, chosen string, rejected string, {scorer.ddl}"
        # Spark's columns have the order of the schema.
        names = ["id", "prompt", "chosen", "rejected", *(c.name for c in scorer.columns)]
        for scored in (
            pairs.mapInPandas(scorer.pandas, schema),
            pairs.mapInArrow(scorer.arrow, schema),
        ):
            rows = {row["id"]: row.asDict() for row in scored.select(*names).collect()}
            check_scores([rows[row["id"]] for row in PLAIN_ROWS], plain_scores)
    finally:
        spark.stop()


def _examples() -> list[tuple[str, str]]:
    folder = Path(__file__).resolve().parents[1] / "examples"
    needed = {
        "ray_data": "ray.data",
        "daft_expression": "daft",
        "hugging_face_datasets": "datasets",
    }
    assert {path.stem for path in folder.glob("*.py")} == {*needed, "spark", "distilabel_step"}
    return list(needed.items())


@pytest.mark.parametrize(("name", "library"), _examples())
def test_the_examples_run(
    name: str,
    library: str,
    request: pytest.FixtureRequest,
    server: Server,
    policy: str,
    plain_scores: Scores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(library)
    if name == "ray_data":
        # Otherwise the example would start a cluster of its own.
        request.getfixturevalue("ray_data")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(PLAIN_ROWS), tmp_path / "in/pairs.parquet")
    main: Callable[..., None] = __import__(name).main
    main(server.target, policy, str(tmp_path / "in"), str(tmp_path / "out"))
    rows = {row["id"]: row for row in parquet.read_table(tmp_path / "out").to_pylist()}
    check_scores([rows[row["id"]] for row in PLAIN_ROWS], plain_scores)
