"""The engine, which serves many adapters from one base, with its requests and answers."""

from lorafit.serving.engine import Engine
from lorafit.serving.pool import Version
from lorafit.serving.request import Answer, Piece, Request, Result, Token
from lorafit.serving.stats import Stats

__all__ = ["Answer", "Engine", "Piece", "Request", "Result", "Stats", "Token", "Version"]
