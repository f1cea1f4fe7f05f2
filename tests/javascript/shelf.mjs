// Files by the SHA-256 of their bytes: fetched in chunks, kept where a lost connection left off, used only when whole.

import { Bundle } from './bundle.mjs';
import { malformed, refuseUnless } from './errors.mjs';
import { sha256 } from './identity.mjs';

const RUNTIME = 'onnx';
const LARGEST_MANIFEST = 4 * 1024 * 1024;
const FILE_NAME = /^[A-Za-z0-9._-]{1,100}$/;
const DIGEST = /^[0-9a-f]{64}$/;

export class Shelf {
  constructor(home, fetch) {
    Object.assign(this, { home, fetch });
  }

  // The content of the blob with this digest and size, from the coordinator or the shelf, where it may have rotted.
  async blob(digest, size) {
    const [name, part] = [`shelf/${digest}`, `shelf/${digest}.part`];
    const isWhole = (content) => content !== null && sha256(content).toString('hex') === digest;
    const held = await this.home.read(name);
    if (isWhole(held)) return held;
    if (await this.home.size(part) > size) await this.home.remove(part);
    const start = await this.home.size(part);
    if (start < size) await this.fetch(digest, start, size, (chunk) => this.home.append(part, chunk));
    const content = await this.home.read(part);
    if (!isWhole(content)) await this.home.remove(part);
    refuseUnless(isWhole(content), 'digest-mismatch', `what came isn't ${digest}`);
    await this.home.rename(part, name);
    return content;
  }

  // The bundle that a release names: its manifest, then the files that this runtime needs.
  async bundle(ort, release) {
    refuseUnless(release.manifest_size <= LARGEST_MANIFEST, 'bundle-invalid', 'a manifest of more than 4 MiB');
    const held = { 'manifest.json': await this.blob(release.bundle_digest, release.manifest_size) };
    const manifest = readManifest(held['manifest.json']);
    for (const name of filesFor(manifest)) held[name] = await this.blob(...manifest.files[name]);
    const bundle = await Bundle.open(ort, async (name) => new Uint8Array(held[name]));
    checkWeights(bundle.manifest, await bundle.weights());
    return bundle;
  }
}

function readManifest(bytes) {
  const refuseAs = (is, words) => refuseUnless(is, 'bundle-invalid', `a manifest ${words}`);
  let manifest;
  try {
    manifest = JSON.parse(bytes.toString('utf8'));
  } catch (error) {
    throw malformed(`a manifest that isn't JSON: ${error.message}`);
  }
  refuseAs(manifest?.format === 1, `of format ${manifest?.format}; this device knows 1`);
  for (const [name, [digest, size]] of Object.entries(manifest.files)) {
    const isGood = FILE_NAME.test(name) && DIGEST.test(digest) && Number.isSafeInteger(size) && size >= 0;
    refuseAs(isGood, `with an odd file: ${JSON.stringify(name)}`);
  }
  refuseAs(manifest.graphs[RUNTIME], 'without graphs for ONNX Runtime');
  for (const needed of [...Object.values(manifest.graphs[RUNTIME]), 'weights.safetensors']) {
    refuseAs(needed in manifest.files, `that names no ${needed}`);
  }
  return manifest;
}

// Those that no graph stands in, and the graphs of this runtime.
function filesFor(manifest) {
  const graphs = new Set(Object.values(manifest.graphs).flatMap((signatures) => Object.values(signatures)));
  const own = new Set(Object.values(manifest.graphs[RUNTIME]));
  return Object.keys(manifest.files).filter((name) => !graphs.has(name) || own.has(name));
}

function checkWeights(manifest, weights) {
  for (const [name, , shape] of [...manifest.trainable, ...manifest.buffers, ...manifest.frozen]) {
    const fits = weights[name]?.type === 'float32' && String(weights[name].dims) === String(shape);
    refuseUnless(fits, 'weights-mismatch', `the bundle's weights have no ${name} of shape [${shape}]`);
  }
}
