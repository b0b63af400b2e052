"""Tasks about texts that a model wrote itself: summaries, questions, extracts, translations and second turns.

    python tasks_about_texts.py tasks.jsonl questions.jsonl ...

reads conversations, as ``kangaroo generate-data`` writes them, and writes the openings of 1,300 others. They are
prompts for ``kangaroo generate-data --prompts``.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SUMMARIES = (
    "Summarize: ",
    "Summarize this text: ",
    "Summarize the following article.\n\n",
    "Give a short summary of this text:\n\n",
)
EXTRACTS = (
    "List the names that this text mentions.\n\n",
    "Extract the most important facts from this text as a list.\n\n",
    "Which numbers and dates are in this text? Answer as JSON.\n\n",
    "Extract the main topic and three keywords.\n\n",
)
LANGUAGES = ("German", "German", "French", "Spanish")
SECOND_TURNS = (
    "Make your answer shorter.",
    "Rewrite your answer as a poem.",
    "Rewrite your answer for a child.",
    "Give an example.",
    "Why is that?",
    "Can you explain the second point in more detail?",
    "What are the disadvantages?",
    "Write the same as a list.",
    "Now answer in the style of a pirate.",
    "What would be different if it were the other way round?",
    "Write it as a letter to a friend.",
    "Edit your answer so that every sentence begins with the letter A.",
    "Which of these is the most important, and why?",
    "Is there a simpler way?",
    "Show it as a table.",
    "Continue.",
)

Message = dict[str, str]


def user(content: str) -> Message:
    """A message of the user's."""
    return {"role": "user", "content": content}


def paragraphs(text: str, most: int) -> str:
    """The first paragraphs of a text, up to ``most`` words and one paragraph at least."""
    words = 0
    kept: list[str] = []
    for part in re.split(r"\n\s*\n", text):
        words += len(part.split())
        if kept and words > most:
            break
        kept.append(part)
    return "\n\n".join(kept)


def sentences(text: str) -> list[str]:
    """Its sentences of 6 to 30 words, without lists, code and headings."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")))
    return [part for part in parts if 6 <= len(part.split()) <= 30 and not re.search(r"[*#`|]", part)]


def tasks(written: list[tuple[str, str]], rng: random.Random) -> Iterator[list[Message]]:
    """Openings of conversations about ``written``, questions with their answers."""
    for _ in range(300):
        text = paragraphs(rng.choice(written)[1], 220)
        yield [user(rng.choice(SUMMARIES) + text)]
    for _ in range(300):
        chosen = rng.sample(written, 2)
        question = paragraphs(rng.choice(chosen)[0], 50)[:300]
        passages = "\n\n".join(paragraphs(answer, 110) for _, answer in chosen)
        forms = (
            f"{passages}\n\nQuestion: {question}",
            f"Answer the question from these passages.\n\n{passages}\n\n{question}",
            f"{question}\n\nHere is what I know:\n\n{passages}",
        )
        yield [user(rng.choice(forms))]
    for _ in range(150):
        text = paragraphs(rng.choice(written)[1], 180)
        yield [user(rng.choice(EXTRACTS) + text)]
    translations = 0
    while translations < 200:
        found = sentences(rng.choice(written)[1])
        if found:
            sentence, language = rng.choice(found), rng.choice(LANGUAGES)
            forms = (
                f"Translate to {language}: {sentence}",
                f"Translate English to {language}: {sentence}",
                f"How do you say this in {language}? {sentence}",
            )
            translations += 1
            yield [user(rng.choice(forms))]
    for _ in range(350):
        question, answer = rng.choice(written)
        first = [user(paragraphs(question, 120)), {"role": "assistant", "content": paragraphs(answer, 160)}]
        yield [*first, user(rng.choice(SECOND_TURNS))]


def main(out: str, *data: str) -> None:
    """Write tasks about the answers in ``data`` that have 40 words and more."""
    turns = [json.loads(line)["messages"] for file in data for line in Path(file).read_text("utf-8").splitlines()]
    written = [(before["content"], answer["content"]) for *_, before, answer in turns]
    rng = random.Random(0)
    made = list(tasks([pair for pair in written if len(pair[1].split()) >= 40], rng))
    rng.shuffle(made)
    Path(out).write_text("".join(json.dumps({"messages": task}) + "\n" for task in made), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("give the file to write, and files of conversations to read")
    main(*sys.argv[1:])
