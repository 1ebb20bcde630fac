"""Many adapters served from one base: the engine, its requests, the adapters it holds."""

from lorafit.serving.engine import Engine
from lorafit.serving.pool import Version
from lorafit.serving.request import Answer, Piece, Request, Result, Token
from lorafit.serving.stats import Stats

__all__ = ["Answer", "Engine", "Piece", "Request", "Result", "Stats", "Token", "Version"]
