"""Boards: policies beside built-in ones, rebuilt systems and bounds."""

from hybridcache.lab.board.ranking import Board, Cell, Split, board, data_hash

__all__ = ["Board", "Cell", "Split", "board", "data_hash"]
