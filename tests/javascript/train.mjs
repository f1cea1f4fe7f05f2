// node train.mjs MODULES BUNDLE BATCHES: train a bundle on batches, and print losses, weights and answers as JSON.
//
// MODULES is where `npm ci` put its packages, BUNDLE a bundle's folder, BATCHES a safetensors file whose tensors are
// named `input.<step>.<name>` and `target.<step>.<name>`.

import { createRequire } from 'node:module';
import { readFile } from 'node:fs/promises';
import path from 'node:path';

import { Bundle, readSafetensors } from './bundle.mjs';

const [modules, folder, batchesFile] = process.argv.slice(2);
const ort = createRequire(path.join(path.resolve(modules), 'here.js'))('onnxruntime-web');
ort.env.wasm.numThreads = 1;

const files = async (name) => new Uint8Array(await readFile(path.join(folder, name)));
const tensors = readSafetensors(ort, new Uint8Array(await readFile(batchesFile)));
const batches = [];
for (const [label, tensor] of Object.entries(tensors)) {
  const [role, step, name] = label.split('.');
  batches[step] ??= { input: {}, target: {} };
  batches[step][role][name] = tensor;
}

const bundle = await Bundle.open(ort, files);
const trainer = await bundle.trainer();
const losses = [];
const began = performance.now();
for (const batch of batches) losses.push(await trainer.step(batch.input, batch.target));
const milliseconds = (performance.now() - began) / batches.length;

const plain = (named) => Object.fromEntries(Object.entries(named).map(([name, t]) => [name, Array.from(t.data, Number)]));
const answers = await (await bundle.predictor())(batches[0].input);
const result = { version: ort.env.versions.web, losses, state: plain(trainer.state), answers: plain(answers), milliseconds };
process.stdout.write(JSON.stringify(result) + '\n');
