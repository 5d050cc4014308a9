"""The judge: rubrics, methods, requests, and the client to any OpenAI-compatible VLM."""
