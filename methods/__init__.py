"""The table of methods. A new one is a file of this folder, imported and listed here.

Their order is that of help and docs; the first whose default() answers runs when none is named.
"""

from methods import (
    arrow,
    ase,
    controls,
    custom,
    drlora,
    fixed,
    joint,
    logo,
    lora_retriever,
    loraflow,
    lorahub,
    merges,
    meteora,
    mixtures,
    once,
    ramole,
    samora,
    smear,
    spectral,
)

METHODS = (
    fixed.Base,
    fixed.Oracle,
    fixed.Named,
    joint.Joint,
    fixed.Uniform,
    fixed.Mix,
    merges.MergedFactors,
    merges.MergedMatrices,
    lorahub.LoraHub,
    arrow.Arrow,
    spectral.SpectR,
    spectral.LAG,
    meteora.Meteora,
    once.MeteoraOnce,
    ase.Ase,
    mixtures.Soft,
    loraflow.LoRAFlow,
    smear.Smear,
    mixtures.MoE,
    drlora.DRLoRA,
    lora_retriever.Selection,
    lora_retriever.RetrievedMixture,
    lora_retriever.Fusion,
    lora_retriever.AdapterSoup,
    ramole.Ramole,
    logo.LoGo,
    samora.Samora,
    controls.RandomGates,
    controls.RandomAdapters,
)
FALLBACK = joint.Joint  # any other name: a folder under POOL/baselines
CUSTOM = custom.Custom  # a name in mole.custom_gates
