"""A small run of one client against a server; needs this client's package only.

    python one_client.py NAME URL FOLDER

Prints one JSON line: the package and its version, requests made, requests completed.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MODEL = "tiny"
USER = [{"role": "user", "content": "import"}]


def guidellm(url, folder):
    """Five text and five chat completions, streamed; requests that fail are counted by guidellm."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"x = {i}\n"}) + "\n" for i in range(5)))
    made = completed = 0
    for number, path in enumerate(("/v1/completions", "/v1/chat/completions")):
        report = folder / f"guidellm-{number}.json"
        subprocess.run(
            [
                Path(sys.executable).parent / "guidellm", "run", "--disable-console",
                "--backend", f"kind=openai_http,target={url},model={MODEL},request_format={path},max_tokens=8",
                "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=5",
                "--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={report}",
            ],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        for benchmark in json.loads(report.read_text())["benchmarks"]:
            totals = benchmark["metrics"]["request_totals"]
            made, completed = made + totals["total"], completed + totals["successful"]
    return made, completed


def litellm(url, folder):
    """Text and chat, whole and streamed; parameters of OpenAI's that the server ignores."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices
    import litellm

    ask = dict(api_base=f"{url}/v1", api_key="none", max_tokens=8)
    whole = litellm.completion(
        f"hosted_vllm/{MODEL}", USER, reasoning_effort="low", metadata={"a": "b"}, user="u", **ask
    )
    stream = list(
        litellm.completion(
            f"openai/{MODEL}", USER, stream=True, stream_options={"include_usage": True}, **ask
        )
    )
    text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="import ", **ask)
    done = [whole.choices[0].message.content, stream, text.choices[0].text]
    long = "x = 1\n" * 2000
    try:
        litellm.completion(f"openai/{MODEL}", [{"role": "user", "content": long}], **ask)
    except litellm.ContextWindowExceededError:  # it reads the server's message
        done.append("refused as it should be")
    return 4, len(done)


def langchain_openai(url, folder):
    """Chat, whole, streamed and as a batch, and text."""
    from langchain_openai import ChatOpenAI, OpenAI

    ask = dict(base_url=f"{url}/v1", api_key="none", model=MODEL, max_tokens=8)
    chat = ChatOpenAI(**ask, stream_usage=True)
    answers = [chat.invoke("import"), *chat.batch(["import", "def f("])]
    chunks = list(chat.stream("import"))
    assert sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) == 8
    text = OpenAI(**ask).invoke("import ")
    return 5, len(answers) + bool(chunks) + isinstance(text, str)


def llama_index(url, folder):
    """Chat and text, whole and streamed."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    completed = 0
    for is_chat in (False, True):
        llm = OpenAILike(
            model=MODEL, api_base=f"{url}/v1", api_key="none", max_tokens=8, is_chat_model=is_chat,
            context_window=512,
        )  # fmt: skip
        completed += isinstance(llm.complete("import ").text, str)
        completed += bool(list(llm.stream_complete("import ")))
        completed += isinstance(
            llm.chat([ChatMessage(role="user", content="x")]).message.content, str
        )
    return 6, completed


def instructor(url, folder):
    """JSON in Markdown, the mode for servers without tools. The answers of so small a model are no JSON:
    a request counts as completed if the answer arrived."""
    import instructor
    import openai
    from pydantic import BaseModel

    class Answer(BaseModel):
        name: str

    completed = []
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=instructor.Mode.MD_JSON
    )
    client.on("completion:response", completed.append)
    for _ in range(3):
        try:
            client.chat.completions.create(
                model=MODEL, messages=USER, response_model=Answer, max_tokens=8, max_retries=0
            )
        except Exception as e:  # noqa: BLE001 - the model's text; anything else is not completed
            print(type(e).__name__, file=sys.stderr)
    return 3, len(completed)


def lm_eval(url, folder):
    """`local-completions`: log-likelihoods and generations of a task made here."""
    import lm_eval

    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"x = {i}\n", "rest": "y"}) + "\n" for i in range(4))
    )
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}\n"
    )
    common += "test_split: test\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{rest}}'\n"
    (folder / "scores.yaml").write_text(
        f"task: scores\noutput_type: loglikelihood\n{common}metric_list: [{{metric: perplexity}}]\n"
    )
    (folder / "texts.yaml").write_text(
        f"task: texts\noutput_type: generate_until\n{common}"
        "generation_kwargs: {until: ['\\n\\n'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"
    )
    results = lm_eval.simple_evaluate(
        "local-completions",
        model_args=f"model={MODEL},base_url={url}/v1/completions,tokenizer={TOKENIZER},max_length=512",
        tasks=["scores", "texts"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
    )
    samples = [s for task in results["samples"].values() for s in task]
    return 8, sum(bool(s["resps"]) for s in samples)


TOKENIZER = str(Path(__file__).resolve().parents[2] / "examples/models/stdlib-llama-3m")
CLIENTS = {
    "guidellm": guidellm,
    "litellm": litellm,
    "langchain-openai": langchain_openai,
    "llama-index-llms-openai-like": llama_index,
    "instructor": instructor,
    "lm-eval": lm_eval,
}

if __name__ == "__main__":
    name, url, folder = sys.argv[1:]
    made, completed = CLIENTS[name](url, Path(folder))
    line = {"client": name, "version": version(name), "requests": made, "completed": completed}
    print(json.dumps(line), flush=True)
