// Files by the SHA-256 of their bytes: fetched in chunks, kept where a lost connection left off, used only when whole.

import { Bundle } from './bundle.mjs';
import { refuseUnless } from './errors.mjs';
import { sha256 } from './identity.mjs';

const RUNTIME = 'onnx';
const LARGEST_MANIFEST = 4 * 1024 * 1024;
const FILE_NAME = /^[A-Za-z0-9._-]{1,100}$/;
const DIGEST = /^[0-9a-f]{64}$/;

export class Shelf {
  constructor(home, fetch) {
    Object.assign(this, { home, fetch });
  }

  // The content of the blob with this digest and size, from the shelf or from the coordinator.
  async blob(digest, size) {
    const name = `shelf/${digest}`;
    const held = await this.home.read(name);
    if (held) return held;
    const part = `${name}.part`;
    const start = await this.home.size(part);
    if (start > size) await this.home.remove(part);
    const append = (chunk) => this.home.append(part, chunk);
    if (start !== size) await this.fetch(digest, start > size ? 0 : start, size, append);
    const content = await this.home.read(part) ?? Buffer.alloc(0);
    if (sha256(content).toString('hex') !== digest) await this.home.remove(part);
    else await this.home.rename(part, name);
    refuseUnless(sha256(content).toString('hex') === digest, 'digest-mismatch', `what came isn't ${digest}`);
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
  let manifest;
  try {
    manifest = JSON.parse(bytes.toString('utf8'));
  } catch (error) {
    refuseUnless(false, 'malformed-message', `a manifest that isn't JSON: ${error.message}`);
  }
  refuseUnless(manifest.format === 1, 'bundle-invalid', `a manifest of format ${manifest.format}; this device knows 1`);
  for (const [name, [digest, size]] of Object.entries(manifest.files)) {
    const good = FILE_NAME.test(name) && DIGEST.test(digest) && Number.isSafeInteger(size) && size >= 0;
    refuseUnless(good, 'bundle-invalid', `a manifest with an odd file: ${JSON.stringify(name)}`);
  }
  for (const needed of [...Object.values(manifest.graphs[RUNTIME] ?? {}), 'weights.safetensors']) {
    refuseUnless(needed in manifest.files, 'bundle-invalid', `the manifest names no ${needed}`);
  }
  refuseUnless(manifest.graphs[RUNTIME], 'bundle-invalid', 'the bundle has no graphs for ONNX Runtime');
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
