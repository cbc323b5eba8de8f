"""PrefixTree: which token prefixes are in the cache, a tree with one node for each page. Knows no device.

A prefix can be continued where its rings were copied. A node therefore has a snapshot of the rings, or leads to nodes
that have one: there is no leaf without.
"""

import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from duo_jax.serve.pages import Pool


@dataclass(eq=False)
class Node:
    """A page of a prefix.

    Attributes:
        key: the page's tokens; fewer than a page's in a node that ends a prompt, see `PrefixTree`.
        page: its number.
        length: tokens of the prefix up to its end.
        parent: the page before; None for the root, which has no page.
        children: the pages that follow, by their tokens.
        snapshot: entry of the rings as they were at its end; None without.
        ends_prompt: whether the snapshot was taken when a prompt was computed, so that a prompt may end here.
        is_pinned: whether it stays for ever.
        is_pinned_end: whether its snapshot does too.
    """

    key: tuple[int, ...] = ()
    page: int = -1
    length: int = 0
    parent: "Node | None" = None
    children: "dict[tuple[int, ...], Node]" = field(default_factory=dict)
    snapshot: int | None = None
    ends_prompt: bool = False
    is_pinned: bool = False
    is_pinned_end: bool = False


@dataclass(frozen=True)
class Hit:
    """What the tree has of a prompt.

    Attributes:
        length: tokens that need not be computed again.
        pages: the pages of these tokens; the caller holds each once more.
        snapshot: the entry of the rings after `length` tokens; None if `length` is 0.
        shared: tokens that the tree has, which is more than `length` where another prompt goes its own way.
        under: the number of the loaded prefix that the prompt continues; 0: none.
    """

    length: int = 0
    pages: tuple[int, ...] = ()
    snapshot: int | None = None
    shared: int = 0
    under: int = 0


class PrefixTree:
    """Prefixes in units of pages; the least recently used are removed first.

    Prompts are computed in chunks that begin at multiples of `chunk_size`, so that a prefix which is continued at one
    gives the numbers of a prompt computed from its beginning, bit for bit. A node at another length ends a prompt: it
    serves only the same prompt, of which nothing is computed again.

    A loaded prefix was computed elsewhere, and is continued at its end, wherever that is. All prompts that begin with
    it continue it, and no others: their prefixes are in a tree of their own, `under` it, so that a prompt never meets
    keys of both kinds.
    """

    def __init__(self, pages: Pool, snapshots: Pool, *, page_size: int, chunk_size: int) -> None:
        """An empty tree. It holds its pages and snapshots in these pools."""
        self._pages, self._snapshots = pages, snapshots
        self._page_size, self._chunk_size = page_size, chunk_size
        self._roots = [Node()]
        # Of each loaded prefix, by the number of its root, the nodes and the tokens.
        self._loaded: list[list[Node]] = [[]]
        self._loaded_tokens: list[tuple[int, ...]] = [()]
        # Nodes that may be removed, the least recently used first. A node comes before its parent, so that a node
        # without children is found first.
        self._order: OrderedDict[Node, None] = OrderedDict()
        self._pinned: dict[Node, None] = {}

    def __len__(self) -> int:
        """Pages in the tree."""
        return len(self._order) + len(self._pinned)

    @property
    def num_pinned(self) -> int:
        """Pages that stay for ever."""
        return len(self._pinned)

    @property
    def num_evictable(self) -> int:
        """Pages that would be free if all nodes that may be removed were."""
        return sum(self._pages.holders(node.page) == 1 for node in self._order)

    def match(self, tokens: Sequence[int]) -> Hit:
        """The longest prefix of `tokens` that can be continued; its pages are then held once more."""
        under = self._under(tokens)
        loaded, nodes = self._loaded[under], self._path(tokens, under)
        shared = nodes[-1].length if nodes else 0
        while nodes and not self._continues(nodes[-1], len(tokens)):
            nodes.pop()
        if loaded and (not nodes or nodes[-1].length < loaded[-1].length):
            nodes = loaded
        if not nodes:
            return Hit(shared=shared)
        self._touch(nodes)
        pages = tuple(node.page for node in nodes)
        self._pages.hold(pages)
        return Hit(nodes[-1].length, pages, nodes[-1].snapshot, max(shared, nodes[-1].length), under)

    def num_pinned_of(self, tokens: Sequence[int]) -> int:
        """Pages of these tokens that stay for ever and can be continued, without one that must be copied for that."""
        under = self._under(tokens)
        nodes = self._path(tokens, under)
        while nodes and not (nodes[-1].is_pinned_end and self._continues(nodes[-1], len(tokens))):
            nodes.pop()
        return max(len(nodes), len(self._loaded_tokens[under]) // self._page_size)

    def insert(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        snapshot: int,
        *,
        under: int = 0,
        of_reply: bool = False,
    ) -> None:
        """Add a prefix with the rings after it, and take over the caller's hold on the snapshot.

        Pages that are new to the tree are held once more.

        Args:
            tokens: the prefix; a multiple of the chunk size, or a whole prompt.
            pages: its pages.
            snapshot: the entry of the rings after it.
            under: the number of the loaded prefix that it continues, as in `Hit`.
            of_reply: the snapshot was taken while a reply was generated.
        """
        node, nodes = self._roots[under], []
        for number, key in enumerate(self._keys(tokens)):
            child = node.children.get(key)
            if child is None:
                self._pages.hold([pages[number]])
                child = node.children[key] = Node(key, pages[number], node.length + len(key), node)
                self._order[child] = None
            node = child
            nodes.append(node)
        if node.snapshot is None or (of_reply < (not node.ends_prompt)):
            self._drop_snapshot(node)
            node.snapshot, node.ends_prompt = snapshot, not of_reply
        else:
            self._snapshots.release([snapshot])
        self._touch(nodes)

    def pin(self, tokens: Sequence[int], under: int = 0) -> bool:
        """Keep a prefix for ever, in whole chunks; False if it cannot be continued there, so that nothing is kept."""
        whole = len(tokens) - len(tokens) % self._chunk_size
        if len(self._loaded_tokens[under]) > whole:
            return True  # A loaded prefix has all of it.
        nodes = self._path(tokens[:whole], under)
        if not nodes or nodes[-1].length < whole or nodes[-1].snapshot is None:
            return False
        self._pin(nodes)
        return True

    def _pin(self, nodes: list[Node]) -> None:
        nodes[-1].is_pinned_end = True
        for node in nodes:
            if not node.is_pinned:
                node.is_pinned = True
                del self._order[node]
                self._pinned[node] = None

    def load(self, tokens: Sequence[int], pages: Sequence[int], snapshot: int) -> int:
        """Add a loaded prefix, of any length, for ever, and return its number; see `insert`."""
        under = len(self._roots)
        self._roots.append(Node())
        self.insert(tokens, pages, snapshot, under=under)
        self._loaded.append(self._path(tokens, under))
        self._pin(self._loaded[under])
        self._loaded_tokens.append(tuple(tokens))
        return under

    def evict_page(self) -> bool:
        """Remove the least recently used nodes until a page is free; False if that cannot free any."""
        unused = (n for n in self._order if not n.children and self._pages.holders(n.page) == 1)
        if (oldest := next(unused, None)) is not None:
            self._remove(oldest)
            return True
        if not self.num_evictable:
            return False
        free = self._pages.num_free
        while self._pages.num_free == free:  # Leaves that a sequence uses are in the way: it keeps their pages.
            self._remove(next(node for node in self._order if not node.children))
        return True

    def evict_snapshot(self, *, within: bool = False) -> bool:
        """Remove a snapshot, and what could only be continued by it; False if there is none.

        Those in the middle of one text go first: it can be continued at its end, where its next turn begins. Of them,
        the one that saves the fewest tokens, so that a text keeps some at even distances. Otherwise the least recently
        used one, unless only those `within` texts may go. The ends of prefixes that are kept for ever stay.
        """
        nodes = (*self._pinned, *self._order)
        kept = [node for node in nodes if node.snapshot is not None and not node.is_pinned_end]
        middle = [node for node in kept if len(node.children) == 1]
        if not middle and (within or not kept):
            return False
        removed = min(middle, key=self._saved) if middle else kept[0]
        self._drop_snapshot(removed)
        self._prune(removed)
        return True

    def _saved(self, node: Node) -> int:
        """Tokens from the snapshot before to that of a node."""
        before = node.parent
        while before is not None and before.parent is not None and before.snapshot is None:
            before = before.parent
        return node.length - (before.length if before is not None else 0)

    def forget(self, tokens: Sequence[int], under: int = 0) -> None:
        """Remove the nodes of these tokens that no other prefix has."""
        for node in reversed(self._path(tokens, under)):
            if node.is_pinned or node.children:
                break
            self._detach(node)

    def drop_end(self, prompt: Sequence[int], under: int = 0) -> bool:
        """Remove the last page of a prompt that ends within it; False if the tree does not have it."""
        nodes = self._path(prompt, under)
        if not nodes or nodes[-1].length % self._page_size == 0 or nodes[-1].is_pinned:
            return False
        self._remove(nodes[-1])
        return True

    def clear(self) -> None:
        """Remove all that may be removed."""
        while self._order:
            self._detach(next(node for node in self._order if not node.children))

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        stack = list(self._roots)
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.parent is not None:
                yield node

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        for start in range(0, len(tokens), self._page_size):
            yield tuple(tokens[start : start + self._page_size])

    def _under(self, prompt: Sequence[int]) -> int:
        """The number of the longest loaded prefix that a prompt continues, by at least a token; 0: none."""
        begun = (
            (len(tokens), number)
            for number, tokens in enumerate(self._loaded_tokens)
            if len(tokens) < len(prompt) and all(map(operator.eq, tokens, prompt))
        )
        return max(begun, default=(0, 0))[1]

    def _path(self, tokens: Sequence[int], under: int = 0) -> list[Node]:
        """The nodes of the longest prefix of `tokens` that the tree has."""
        nodes, node = [], self._roots[under]
        for key in self._keys(tokens):
            child = node.children.get(key)
            if child is None:
                break
            node = child
            nodes.append(node)
        return nodes

    def _continues(self, node: Node, length: int) -> bool:
        """Whether a prompt of `length` tokens can be computed from this node on."""
        if node.snapshot is None:
            return False
        return node.ends_prompt if node.length == length else node.length % self._chunk_size == 0

    def _touch(self, nodes: list[Node]) -> None:
        for node in reversed(nodes):
            if not node.is_pinned:
                self._order.move_to_end(node)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        self._detach(node)
        if parent is not None:
            self._prune(parent)

    def _prune(self, node: Node) -> None:
        """Remove nodes that lead to no snapshot any more, from this one up."""
        while node.parent is not None and not (node.children or node.is_pinned or node.snapshot is not None):
            parent = node.parent
            self._detach(node)
            node = parent

    def _detach(self, node: Node) -> None:
        """Remove a node without children."""
        assert node.parent is not None and not node.children
        self._drop_snapshot(node)
        del node.parent.children[node.key], self._order[node]
        self._pages.release([node.page])

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self._snapshots.release([node.snapshot])
            node.snapshot = None
