"""A conversation: the second question only makes sense after the first answer."""

from connection import arguments, connect

found = arguments("Chat about a city.").parse_args()
client, model = connect(found)
messages = [{"role": "system", "content": "Answer in one sentence."}]
for question in ("What is the capital of France?", "Which river flows through it?"):
    messages.append({"role": "user", "content": question})
    completion = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=found.max_tokens)
    answer = completion.choices[0].message.content
    messages.append({"role": "assistant", "content": answer})
    print(f"{question}\n    {answer}")
print(
    f"{completion.usage.prompt_tokens} prompt tokens, "
    f"{completion.usage.prompt_tokens_details.cached_tokens} of them from the cache"
)
