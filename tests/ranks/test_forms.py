"""The four ways to start several ranks give what one rank gives, and leave nothing behind."""

from __future__ import annotations

from launch import free_port
from started import DEEPSPEED, DS_SERVE, MAX_TOKENS, PROMPTS, WANTED, Server, Started


def deepspeed(ranks, *command):
    return (*DEEPSPEED, "--num_accelerators", ranks, "--master_port", free_port(), *command)


def test_serve_starts_its_own_ranks(texts, tmp_path):
    with Server(tmp_path / "s", *DS_SERVE, "serve", "demo", "--dtype", "float32", "--tp", 2) as server:
        assert "tensor parallel 2 x pipeline parallel 1" in server.out.read_text()
        assert [server.chat(prompt, MAX_TOKENS) for prompt in PROMPTS] == texts
        server.terminate()


def test_generate_starts_its_own_ranks(texts, tmp_path):
    command = (*DS_SERVE, "generate", "demo", *WANTED, "--tp", 2)
    with Started(tmp_path / "g", *command, stdin="\n".join(PROMPTS)) as ranks:
        ranks.end(0)
        assert ranks.out.read_text().splitlines() == texts
        assert ranks.err.read_text() == ""


def test_a_command_under_the_launcher(texts, tmp_path):
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    command = deepspeed(2, "--module", "ds_serve", "generate", "demo", *WANTED, "--pp", 2, *prompts)
    with Started(tmp_path / "c", *command) as ranks:
        ranks.end(0)
        assert ranks.out.read_text().splitlines() == texts
        assert ranks.err.read_text() == ""


SCRIPT = f"""
import ds_serve
from ds_serve.demo import model_path

for _ in range(2):
    pipe = ds_serve.pipeline(
        model=model_path(), tensor_parallel=1, pipeline_parallel=2, dtype="float32", num_blocks=128,
        max_new_tokens={MAX_TOKENS}, do_sample=False,
    )
    chats = [[{{"role": "user", "content": prompt}}] for prompt in {PROMPTS!r}]
    for [answer] in pipe(chats):
        print(answer["generated_text"][-1]["content"])
    pipe.close()
"""


def test_a_users_script_under_the_launcher(texts, tmp_path):
    """Rank 0 has the answers, twice; the other rank never leaves its first call."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with Started(tmp_path / "u", *deepspeed(2, script)) as ranks:
        ranks.end(0)
        assert ranks.out.read_text().splitlines() == texts + texts
        assert ranks.err.read_text() == ""


def test_a_wrong_number_of_ranks_is_refused(tmp_path):
    command = deepspeed(2, "--module", "ds_serve", "generate", "demo", "--prompt", "a", "--tp", 2, "--pp", 2)
    with Started(tmp_path / "w", *command) as ranks:
        ranks.end(2)
        errors = ranks.err.read_text()
    assert errors.count("tensor_parallel 2 x pipeline_parallel 2 need 4 ranks, but 2 were started") == 1
    assert "Traceback" not in errors
