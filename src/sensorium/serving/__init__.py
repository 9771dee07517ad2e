"""What every front end shares: served models, prompts, media, generation. Knows neither HTTP nor pydantic."""
