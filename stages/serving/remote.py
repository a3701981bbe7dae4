"""llama.cpp servers that were started elsewhere: whether they serve the release that they are to answer with."""

from collections.abc import Mapping, Sequence

from stages.chats import chat_sha256, with_system
from stages.llm.endpoint import Endpoint
from stages.params import Chat
from stages.program.errors import BadModelFile, ServerFailed
from stages.records import Message
from stages.release import Release, ask, embedded_template

QUESTIONS = ("What is this about?", "How do I start?", "Why does it fail, and what can I do?")
LIKELIEST, SHOWN = 3, 20  # first tokens that are compared, and those among which they must be
TOLERANCE = 0.25  # nats, for the rounding of other processors

REACH_S = 10  # a machine that is off answers nothing at all

Fingerprint = Sequence[Mapping[int, float]]  # for each question the log probabilities of the likeliest first tokens


def fingerprint(endpoint: Endpoint, release: Release) -> Fingerprint:
    """What tells the model at `endpoint` from others: how likely it finds its first words. Raises ServerFailed."""
    found = []
    for question in QUESTIONS:
        messages = with_system(release.system_prompt, [Message("user", question)])
        body = {"model": endpoint.model, "messages": messages, "max_tokens": 1, "temperature": 0}
        reply = ask(endpoint, "/v1/chat/completions", body | {"logprobs": True, "top_logprobs": SHOWN, "cache_prompt": False})
        try:
            likeliest = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append({int(token["id"]): float(token["logprob"]) for token in likeliest})
        except (KeyError, IndexError, TypeError, ValueError):
            raise BadModelFile(
                f"{endpoint.url} gives no likelihoods of tokens with their ids; it must be a llama.cpp server"
            ) from None
    return found


def distance(expected: Fingerprint, found: Fingerprint) -> float:
    """The largest difference of a likeliest token's log probability, in nats; infinite where one is not likely at all."""
    differences = []
    for ours, theirs in zip(expected, found, strict=True):
        for token in sorted(ours, key=lambda token: -ours[token])[:LIKELIEST]:
            differences.append(abs(ours[token] - theirs[token]) if token in theirs else float("inf"))
    return max(differences)


def check_remote(endpoint: Endpoint, release: Release, chat: Chat, expected: Fingerprint) -> None:
    """Raises BadModelFile unless the server at `endpoint` answers as the release does, ServerFailed when it cannot be reached."""
    advice = "start it with the release's GGUF file"
    try:
        listed = [model.get("id") for model in ask(endpoint, "/v1/models", timeout_s=REACH_S)["data"]]
        if endpoint.model not in listed:
            raise BadModelFile(f"{endpoint.url} serves {listed}, not {endpoint.model}; {advice} and --alias {endpoint.model}")
        if chat_sha256(embedded_template(endpoint), release.system_prompt) != release.chat_sha256:
            raise BadModelFile(f"{endpoint.url}: its chat template is not the release's; {advice}")
        tokens = ask(endpoint, "/props")["default_generation_settings"]["n_ctx"]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BadModelFile(f"{endpoint.url} does not describe itself as llama.cpp servers do") from None
    except ServerFailed as error:
        raise ServerFailed(f"{endpoint.url}: {error}") from None
    if tokens < chat.context_tokens:
        raise BadModelFile(
            f"{endpoint.url} has {tokens} tokens of context for an answer, and chat.context_tokens is {chat.context_tokens}"
        )
    if (far := distance(expected, fingerprint(endpoint, release))) > TOLERANCE:
        raise BadModelFile(
            f"{endpoint.url} serves another model than the release: the likelihoods of its first words are {far:.2f} nats apart; {advice}"
        )
