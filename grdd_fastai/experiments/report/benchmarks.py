"""The tables of benchmarks/README.md."""
import json
from collections import defaultdict

from .markdown import markdown_table

__all__ = ['benchmark', 'benchmark_tables']


def benchmark_source(r, *packages):
    "Device, versions, commit and command of a benchmark's record"
    versions = ', '.join(f'{k} {v}' for k,v in r['versions'].items() if k in packages)
    return f"{r['device']}, {r['cores']} cores; {versions}; commit {r['commit'][:8]}, `{r['command']}`"

def benchmark(path):
    "Table of benchmarks/evaluate.py"
    r = json.loads(path.read_text())
    methods = defaultdict(dict)
    for line in r['lines']: methods[line['method']].update(line)
    both = [[k, f"{o['easyfsl_us']:,.0f}", f"{o['ours_us']:,.0f}", f"{o['ratio']:.1f}", f"{o['accuracy_easyfsl']:.2f}",
             f"{o['accuracy_ours']:.2f} ({o['episodes']} episodes)"] for k,o in methods.items() if 'ratio' in o]
    ours = [f"| {k} | | {1e6/o['episodes_per_second']:,.0f} ({o['episodes_per_second']:.0f} episodes/s) | | | |"
            for k,o in methods.items() if 'episodes_per_second' in o]
    e = methods['evaluation']
    return '\n'.join([
        markdown_table(['method', 'easyfsl, us per episode', 'ours', 'ratio', 'accuracy, easyfsl', 'ours'], both), *ours, '',
        'Ten thousand 5-way 1-shot episodes of 12,000 images and their ConvNet-4 forward pass take '
        f"{e['forward_and_episodes_over_forward']:.2f} times "
        f"the forward pass alone ({e['forward_s']:.1f} s + {e['episodes_10000_s']:.1f} s, {e['threads']} threads).", '',
        benchmark_source(r, 'torch', 'numpy', 'easyfsl')])

def benchmark_tables(path):
    "The lines of any other benchmark as tables, one for each kind of line"
    r = json.loads(path.read_text())
    kinds = defaultdict(list) # names of the entries -> lines
    for line in r['lines']: kinds[tuple(line)].append(line)
    def cell(v): return f'{v:,}' if isinstance(v, (int, float)) and not isinstance(v, bool) else '' if v is None else str(v)
    parts = [markdown_table(names, [map(cell, line.values()) for line in lines]) for names,lines in kinds.items()]
    floor = next((line['gflop_per_image'] for line in r['lines'] if (line['name'], line.get('px')) == ('resnet12', 32)), None)
    if floor:
        parts.append("Counted floor of the paper's stage one on CIFAR-FS: 90 epochs of 38,400 images at four rotations, "
                     f'{floor} GFLOP each with ResNet-12: {90*38400*4*floor*1e9:.2g} floating-point operations.')
    return '\n\n'.join([*parts, benchmark_source(r, 'torch', 'fastai', 'albumentations', 'easyfsl')])
