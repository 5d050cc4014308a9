"""The judge: rubrics, requests, the client to any OpenAI-compatible VLM, and the embedded reference judge."""
