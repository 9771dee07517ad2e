"""Request bodies as strict pydantic models, one file per endpoint family; the only pydantic in the project."""
