"""Routing rules in float64, sample by sample, from their definitions: slow, and independent of the project's code."""

import math

CLASSES = 3
LOWEST = -math.inf


def softmax(values):
    """Of a list in which minus infinity stands for what may not be chosen."""
    peak = max(values)
    terms = [math.exp(value - peak) if value > LOWEST else 0.0 for value in values]
    return [term / math.fsum(terms) for term in terms]


def log_sum(values):
    peak = max(values)
    return peak if peak == LOWEST else peak + math.log(math.fsum(math.exp(value - peak) for value in values))


def best(values, k):
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def over(chosen, values, among=None):
    """Softmax of `values` over the chosen entries, or of `among` at their positions."""
    gate = softmax([values[e] if e in (among or chosen) else LOWEST for e in range(len(values))])
    return [gate[e] for e in chosen]


class Plain:
    """A rule whose weights are the softmax over the chosen experts, or over all experts if only one is chosen."""

    def __init__(self, z, config, bias, allowed):
        self.config, self.allowed = config, allowed
        self.z = [value if on else LOWEST for value, on in zip(z, allowed, strict=True)]
        self.hot = [value / config.temperature for value in self.z]
        self.ranked = [s + b if on else LOWEST for s, b, on in zip(self.scores(), bias, allowed, strict=True)]

    def scores(self):
        return self.z

    def choose(self):
        return best(self.ranked, self.config.top_k)

    def gate(self):
        return softmax(self.hot)

    def weights(self, chosen, counted):
        """counted: those that a renormalisation is over."""
        return over(chosen, self.hot, range(len(self.hot)) if self.config.top_k == 1 else counted)

    def wanted(self, chosen):
        return [True] * len(chosen)


class SoftmaxFirst(Plain):
    def weights(self, chosen, counted):
        return [self.gate()[e] for e in chosen]


class GShard(Plain):
    def wanted(self, chosen):
        return [True, 2 * self.weights(chosen, chosen)[1] > DRAW]


class TopP(SoftmaxFirst):
    def choose(self):
        return best(self.ranked, len(self.ranked))

    def wanted(self, chosen):
        gates = [self.gate()[e] for e in chosen]
        return [math.fsum(gates[:i]) < self.config.p and gate > 0 for i, gate in enumerate(gates)]


class Sinkhorn(SoftmaxFirst):
    """Its bias holds the scales of the columns: `scaled`."""

    def weights(self, chosen, counted):
        if self.config.top_k > 1:
            return super().weights(chosen, counted)
        return [1 / (1 + math.exp(-self.hot[e])) for e in chosen]

    @staticmethod
    def scaled(config, samples, bias):
        """The bias and the logarithms of the scales, by multiplying rows and columns in turn."""
        t = config.temperature
        plan = [[math.exp((value + b) / t) for value, b in zip(z, bias, strict=True)] for z in samples]
        scales = [1.0] * len(bias)
        for _ in range(config.sinkhorn_iterations):
            plan = [[value / math.fsum(row) for value in row] for row in plan]
            factors = [len(plan) / len(bias) / math.fsum(column) for column in zip(*plan, strict=True)]
            plan = [[value * factor for value, factor in zip(row, factors, strict=True)] for row in plan]
            scales = [scale * factor for scale, factor in zip(scales, factors, strict=True)]
        return [b + t * math.log(scale) for b, scale in zip(bias, scales, strict=True)]


class DeepSeek(Plain):
    def scores(self):
        if self.config.scores == "softmax":
            return softmax(self.hot)
        return [0.0 if value == LOWEST else 1 / (1 + math.exp(-value)) for value in self.hot]

    def weights(self, chosen, counted):
        scores = self.scores()
        total = math.fsum(scores[e] for e in counted)
        renormalise = self.config.scores == "sigmoid" and self.config.top_k > 1
        return [scores[e] / total if renormalise else scores[e] for e in chosen]


class Hash(Plain):
    def weights(self, chosen, counted):
        there = [e for e in counted if self.allowed[e]]
        return [1 / len(there) if e in there else 0.0 for e in chosen]


class Hierarchical(Plain):
    def __init__(self, z, config, bias, allowed):
        g, self.config, self.allowed = config.groups, config, allowed
        size = len(bias) // g
        self.members = [range(i * size, (i + 1) * size) for i in range(g)]
        inner = [value if on else LOWEST for value, on in zip(z[g:], allowed, strict=True)]
        full = [log_sum([z[g + e] for e in members]) for members in self.members]
        # A group has the probability of those of its experts that may be chosen.
        self.groups = [z[i] + log_sum([inner[e] for e in members]) - full[i] for i, members in enumerate(self.members)]
        self.inner = inner
        self.group_ranks = []
        for i, members in enumerate(self.members):
            raised = log_sum([inner[e] + bias[e] for e in members])
            plain = log_sum([inner[e] for e in members])
            self.group_ranks.append(LOWEST if plain == LOWEST else self.groups[i] + raised - plain)
        self.ranks = [value + b for value, b in zip(inner, bias, strict=True)]

    def choose(self):
        found = []
        for group in best(self.group_ranks, self.config.top_groups):
            ranks = [self.ranks[e] for e in self.members[group]]
            found += [self.members[group][m] for m in best(ranks, self.config.top_k // self.config.top_groups)]
        return found

    def hot_levels(self, group):
        t = self.config.temperature
        return [value / t for value in self.groups], [self.inner[e] / t for e in self.members[group]]

    def gate(self):
        gates = [0.0] * len(self.inner)
        for group, members in enumerate(self.members):
            outer, inner = self.hot_levels(group)
            if outer[group] > LOWEST:
                for e, p in zip(members, softmax(inner), strict=True):
                    gates[e] = softmax(outer)[group] * p
        return gates

    def weights(self, chosen, counted):
        chosen_groups = [g for g, members in enumerate(self.members) if set(members) & set(chosen)]
        among = range(len(self.groups)) if self.config.top_groups == 1 else chosen_groups
        found = []
        for e in chosen:
            group = next(g for g, members in enumerate(self.members) if e in members)
            outer, inner = self.hot_levels(group)
            if not self.allowed[e]:
                found.append(0.0)
                continue
            start = self.members[group][0]
            mine = [c - start for c in chosen if c in self.members[group]]
            within = over([e - start], inner, range(len(inner)) if len(mine) == 1 else mine)[0]
            found.append(over([group], outer, among)[0] * within)
        return found


DRAW = 0.5  # replaces every random number between 0 and 1
RULES = {
    "article": Plain,
    "noisy_topk": Plain,
    "mixtral": Plain,
    "vmoe": SoftmaxFirst,
    "switch": SoftmaxFirst,
    "gshard": GShard,
    "deepseek": DeepSeek,
    "hash": Hash,
    "hierarchical": Hierarchical,
    "top_p": TopP,
    "sinkhorn": Sinkhorn,
}


def reference(config, samples, bias, allowed, training):
    """Per sample {expert: weight}, the residual weight, and the number of choices without a slot."""
    if config.kind == "sinkhorn" and training and len(samples) * config.top_k >= len(bias):
        bias = Sinkhorn.scaled(config, samples, bias)
    rules = [RULES[config.kind](z, config, bias, allowed) for z in samples]
    choices = [rule.choose() for rule in rules]
    first = [rule.weights(chosen, chosen) for rule, chosen in zip(rules, choices, strict=True)]
    wanted = [
        rule.wanted(chosen) if training or config.kind == "top_p" else [True] * len(chosen)
        for rule, chosen in zip(rules, choices, strict=True)
    ]
    asked = [[e for e, on in zip(*pair, strict=True) if on] for pair in zip(choices, wanted, strict=True)]
    weight = [dict(zip(*pair, strict=True)) for pair in zip(choices, first, strict=True)]
    if not training or config.capacity_factor is None:
        return [{e: weight[b][e] for e in asked[b]} for b in range(len(rules))], [0.0] * len(rules), 0
    room = math.ceil(round(len(rules) * config.top_k * config.capacity_factor / len(bias), 9))
    left = [min(max(1, room), len(rules))] * len(bias)
    order = list(range(len(rules)))
    if config.capacity_order == "priority":
        order.sort(key=lambda b: -max(rules[b].gate()))
    got = [[] for _ in rules]
    for turn in range(len(choices[0])):
        for b in order:
            if wanted[b][turn] and left[choices[b][turn]]:
                left[choices[b][turn]] -= 1
                got[b].append(choices[b][turn])
    lost = [[e for e in asked[b] if e not in got[b]] for b in range(len(rules))]
    if config.overflow == "next_best":
        ranks = [best(rule.ranked, len(bias)) for rule in rules]
        for turn in range(len(bias)):
            for b in order:
                e = ranks[b][turn]
                if len(got[b]) < len(asked[b]) and e not in asked[b] and left[e]:
                    left[e] -= 1
                    got[b].append(e)
        for b, rule in enumerate(rules):
            unwanted = [e for e in choices[b] if e not in asked[b] and e not in got[b]]
            weight[b] = dict(zip(got[b], rule.weights(got[b], got[b] + unwanted), strict=True)) if got[b] else {}
    residual = [
        math.fsum(weight[b][e] for e in lost[b]) if config.overflow == "residual" else 0.0 for b in range(len(rules))
    ]
    dropped = sum(map(len, asked)) - sum(map(len, got))
    return [{e: weight[b][e] for e in got[b]} for b in range(len(rules))], residual, dropped


def mixed(weights, outputs, combine):
    """The combination of E experts' outputs (E, C): log-probabilities for one sample."""
    if combine == "logits":
        totals = [math.fsum(w * outputs[e][c] for e, w in weights.items()) for c in range(CLASSES)]
    else:
        logs = {e: [value - log_sum(outputs[e]) for value in outputs[e]] for e in weights}
        used = {e: math.log(w) for e, w in weights.items() if w > 0} or dict.fromkeys(weights, 0.0)
        totals = [log_sum([log_w + logs[e][c] for e, log_w in used.items()] or [0.0]) for c in range(CLASSES)]
    return [total - log_sum(totals) for total in totals]
