"""`maskopt evaluate`: two models side by side, and tasks of lm-eval where it is installed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from maskopt.models import load_model

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install "maskopt[eval]"'
)
PRUNING = ("-s", 0.7, "--solver", "wanda", "--samples", 4, "--quiet")
CHOICES = ("quick", "lazy", "brown fox")


@pytest.fixture
def pruned(run, model, text, tmp_path):
    run("prune", model, tmp_path / "pruned", "--calibration", text, *PRUNING)
    return tmp_path / "pruned"


def test_two_models_are_measured_on_the_same_windows(run, model, pruned, text, tmp_path, read):
    alone = [json.loads(run("evaluate", each, "--text", text, "--json", "-").stdout) for each in (model, pruned)]
    said = run("evaluate", pruned, "--against", model, "--text", text, "--json", tmp_path / "both.json").stdout
    both = read(tmp_path / "both.json")
    assert both["against"]["perplexity"] == alone[0]["perplexity"]
    assert both["perplexity"] == alone[1]["perplexity"] != alone[0]["perplexity"]
    assert both["perplexity_ratio"] == both["perplexity"] / both["against"]["perplexity"]
    assert both["settings"]["against"] == str(model)
    assert f"{both['against']['perplexity']:.4f} dense, {both['perplexity']:.4f} pruned" in said
    assert "against" not in alone[1]


def test_packed_folders_are_measured_side_by_side(run, pruned, text, tmp_path):
    run("pack", pruned, tmp_path / "packed")
    both = json.loads(run("evaluate", tmp_path / "packed", "--against", pruned, "--text", text, "--json", "-").stdout)
    assert both["perplexity_ratio"] == 1.0


def test_perplexities_of_other_windows_are_not_compared(run, model, text, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    result = run("evaluate", model, "--against", short, "--text", text, "--json", "-")
    figures = json.loads(result.stdout)
    assert "perplexity_ratio" not in figures
    assert (figures["against"]["seqlen"], figures["seqlen"]) == (16, 32)
    assert "cannot be compared" in " ".join(result.stderr.split())


def test_what_cannot_be_measured_is_refused_before_any_model_is_loaded(fails, text, tmp_path, monkeypatch):
    nowhere = tmp_path / "no-model"
    assert "give --text for perplexity, --tasks for tasks, or both" in fails("evaluate", nowhere)
    for option, value in (("--limit", 3), ("--include-path", tmp_path)):
        assert f"{option} applies to tasks" in fails("evaluate", nowhere, "--text", text, option, value)
    assert "--seqlen applies to perplexity" in fails("evaluate", nowhere, "--tasks", "arc_easy", "--seqlen", 8)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'pip install "maskopt[eval]"' in fails("evaluate", nowhere, "--text", text, "--tasks", "arc_easy")


def write_task(folder, name, questions, **changes):
    """Write a task of multiple choice, and its data beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in questions))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task))  # of which YAML is a superset
    return path


def questions(count):
    return [{"question": f"the {'very ' * (i % 4)}dog is", "choices": CHOICES, "answer": i % 3} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A folder of two tasks."""
    made = tmp_path / "tasks"
    made.mkdir()
    write_task(made, "pets", questions(11))
    write_task(made, "pets_in_context", questions(7), num_fewshot=2, fewshot_split="test")
    return made


def accuracies(folder, docs):
    """Return acc and acc_norm by their definition: the choice of the largest likelihood, and of that per character."""
    model, tokenizer = load_model(folder)
    right = {"acc": 0, "acc_norm": 0}
    for doc in docs:
        begin = tokenizer(doc["question"])["input_ids"]
        sums = []
        for choice in doc["choices"]:
            ids = tokenizer(f"{doc['question']} {choice}")["input_ids"]
            logs = model(torch.tensor([ids])).logits[0].log_softmax(1)
            sums.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
        norms = [value / len(choice) for value, choice in zip(sums, doc["choices"], strict=True)]
        for metric, values in (("acc", sums), ("acc_norm", norms)):
            right[metric] += values.index(max(values)) == doc["answer"]
    return {metric: count / len(docs) for metric, count in right.items()}


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_have_the_accuracies_of_their_definition(run, model, pruned, folder, text, tmp_path, read):
    options = ("--tasks", folder / "pets.yaml", "--text", text, "--json", tmp_path / "both.json", "--batch-size", 4)
    result = run("evaluate", pruned, "--against", model, *options)
    both = read(tmp_path / "both.json")
    for measured, path in ((both, pruned), (both["against"], model)):
        scores = {score["metric"]: score for score in measured["tasks"]}
        assert {metric: score["value"] for metric, score in scores.items()} == accuracies(path, questions(11))
        assert {score["examples"] for score in scores.values()} == {11}
        assert all(score["error"] > 0 or score["value"] in (0, 1) for score in scores.values())
        assert measured["perplexity"] > 1
    assert both["versions"]["lm_eval"]
    assert result.stderr == ""
    row = next(line.split() for line in result.stdout.splitlines() if "pets acc " in line)
    assert row[-1] == f"{both['tasks'][0]['value'] - both['against']['tasks'][0]['value']:+.4f}"


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_packed_folders_score_as_what_was_packed_and_as_with_lm_eval_itself(run, pruned, folder, tmp_path):
    import lm_eval

    run("pack", pruned, tmp_path / "packed")
    options = ("--tasks", "pets*", "--include-path", folder, "--limit", 5, "--json", "-")
    both = json.loads(run("evaluate", tmp_path / "packed", "--against", pruned, *options).stdout)
    assert both["tasks"] == both["against"]["tasks"]
    assert both["settings"]["tasks"] == ["pets", "pets_in_context"]
    assert [score["shots"] for score in both["tasks"]] == [0, 0, 2, 2]
    assert {score["examples"] for score in both["tasks"]} == {5}

    model, tokenizer = load_model(pruned)
    wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, prefix_token_id=0)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder))
    own = lm_eval.simple_evaluate(wrapped, tasks=["pets", "pets_in_context"], task_manager=manager, limit=5)["results"]
    for score in both["tasks"]:
        assert score["value"] == own[score["task"]][f"{score['metric']},none"]
        assert score["error"] == pytest.approx(own[score["task"]][f"{score['metric']}_stderr,none"])


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_that_cannot_be_run_are_refused_in_a_sentence(fails, model, folder, tmp_path):
    nowhere = tmp_path / "no-model"
    assert "no.yaml does not exist" in fails("evaluate", nowhere, "--tasks", "no.yaml")
    assert "No task is named" in fails("evaluate", nowhere, "--tasks", ",")
    missing = "does not exist or is not a folder"
    assert missing in fails("evaluate", nowhere, "--tasks", "pets", "--include-path", nowhere)
    assert "has no task 'petz'; similar names: pets" in fails(
        "evaluate", nowhere, "--tasks", "petz", "--include-path", folder
    )
    assert "is a folder; give it with --include-path" in fails("evaluate", nowhere, "--tasks", folder)
    (folder / "broken.yaml").write_text("task: [")
    assert "broken.yaml cannot be loaded" in fails("evaluate", nowhere, "--tasks", folder / "broken.yaml")
    # Loading a task looks at its first question only.
    (folder / "mine.py").write_text("def ask(doc):\n    return {'the dog is': 'what is'}[doc['question']]\n")
    failing = write_task(folder, "failing", questions(3), doc_to_text="ASK")
    failing.write_text(failing.read_text().replace('"ASK"', "!function mine.ask"))
    assert "failing.yaml failed on the LlamaForCausalLM: 'the very dog is'" in fails(
        "evaluate", model, "--tasks", failing
    )


@needs_lm_eval
def test_data_that_are_not_there_are_told_in_one_line_without_a_network(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "maskopt", "evaluate", "no-model", "--tasks", "arc_easy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("The task arc_easy cannot be loaded: ")
    assert done.stderr.count("\n") == 1
