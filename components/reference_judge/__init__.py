"""The embedded stand-in for a VLM: pixel rules behind the OpenAI API, so that the complete job runs on one machine.

It knows a request only as any judge does, by its words and images; the client (`components/judge`) never imports it.
"""
