"""POST /v1/embeddings."""

from __future__ import annotations

from sensorium.api.context import Context, Entry
from sensorium.api.generated import Asker
from sensorium.api.pooled import opened, pool_inputs
from sensorium.api.protocol.pooling import EmbeddingsRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import Kind, respond_vectors
from sensorium.errors import RequestError

_EMBEDDINGS = Kind("embd", "embedding", "embedding")


async def embeddings(context: Context, call: Call) -> None:
    async with opened(context, call, EmbeddingsRequest, "embed") as job:
        job.entry.need("embed")
        check_dimensions(job.entry, job.request.dimensions)
        pooled = await pool_inputs(job, job.request.params())
        await respond_vectors(call, pooled, _EMBEDDINGS, job.model_name, job.request, job.request.form)


def check_dimensions(entry: Asker | Entry, wanted: int | None, *, param: str = "dimensions") -> None:
    """Only vectors of models that were trained for it mean anything when they are cut."""
    ready = entry.model.client.ready
    whole = ready.embedding_size if ready is not None else 0
    if wanted is None or wanted == whole:
        return
    sizes = entry.model.matryoshka_sizes
    if sizes is None:
        raise RequestError(
            f"The model {entry.name!r} does not support Matryoshka embeddings; `{param}` must be "
            f"left out or {whole}. The operator can allow it with --matryoshka-dimensions.",
            param=param,
        )
    if sizes and wanted not in sizes:
        raise RequestError(f"`{param}` must be one of {', '.join(map(str, sizes))} with this model.", param=param)
    if wanted > whole:
        raise RequestError(f"`{param}` must be at most {whole} with this model.", param="dimensions")
