// node --test shelf.test.mjs: what a device takes onto its shelf, from a coordinator that says what a test wants.

import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import test, { after } from 'node:test';

import { Home } from './home.mjs';
import { sha256 } from './identity.mjs';
import { Shelf } from './shelf.mjs';

const digestOf = (content) => sha256(content).toString('hex');
const ort = { Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } } };

// A safetensors file with one tensor of two numbers.
function weightsOf(name, shape = [2]) {
  const header = Buffer.from(JSON.stringify({ [name]: { dtype: 'F32', shape, data_offsets: [0, 8] } }));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  return Buffer.concat([length, header, Buffer.alloc(8)]);
}

const FILES = {
  'weights.safetensors': weightsOf('p_w'), 'train.onnx': Buffer.from('a graph'), 'train.tflite': Buffer.from('another'),
};

function manifestOf(changes = {}, files = FILES) {
  const named = Object.entries(files).map(([name, content]) => [name, [digestOf(content), content.length]]);
  return {
    format: 1, trainable: [['p_w', 'float32', [2]]], buffers: [], frozen: [],
    graphs: { onnx: { train: 'train.onnx' }, litert: { train: 'train.tflite' } }, files: Object.fromEntries(named), ...changes,
  };
}

// A shelf in a new folder, its coordinator, and what was asked of that.
function shelfOf(manifest, files = FILES) {
  const content = Buffer.from(typeof manifest === 'string' ? manifest : JSON.stringify(manifest));
  const blobs = new Map([content, ...Object.values(files)].map((blob) => [digestOf(blob), blob]));
  const asked = [];
  const home = new Home(mkdtempSync(path.join(tmpdir(), 'shelf-')));
  after(() => rmSync(home.folder, { recursive: true }));
  const fetch = async (digest, offset, size, take) => {
    asked.push(digest);
    await take(blobs.get(digest).subarray(offset));
  };
  const release = { bundle_digest: digestOf(content), manifest_size: content.length };
  return { shelf: new Shelf(home, fetch), home, release, asked };
}

test('the graphs of another runtime are not fetched, and nothing is fetched twice', async () => {
  const { shelf, home, release, asked } = shelfOf(manifestOf());
  await shelf.bundle(ort, release);
  await shelf.bundle(ort, release);
  const wanted = [release.bundle_digest, digestOf(FILES['weights.safetensors']), digestOf(FILES['train.onnx'])];
  assert.deepEqual(asked, wanted);
  assert.deepEqual(readdirSync(home.path('shelf')).sort(), wanted.sort());
});

test('a manifest of more than 4 MiB is not asked for', async () => {
  const { shelf, release, asked } = shelfOf(manifestOf());
  const large = { ...release, manifest_size: 4 * 1024 * 1024 + 1 };
  await assert.rejects(shelf.bundle(ort, large), { code: 'bundle-invalid' });
  assert.deepEqual(asked, []);
});

test('bytes of another digest are refused, and don\'t stay', async () => {
  const { shelf, home, release } = shelfOf(manifestOf());
  const other = { ...release, bundle_digest: 'ab'.repeat(32) };
  shelf.fetch = async (digest, offset, size, take) => take(Buffer.alloc(size));
  await assert.rejects(shelf.bundle(ort, other), { code: 'digest-mismatch' });
  assert.deepEqual(readdirSync(home.path('shelf')), []);
});

test('a blob that rotted on the shelf is fetched anew', async () => {
  const { shelf, home, release, asked } = shelfOf(manifestOf());
  await shelf.bundle(ort, release);
  await home.write(`shelf/${digestOf(FILES['train.onnx'])}`, 'another graph');
  await shelf.bundle(ort, release);
  assert.equal(asked.length, 4);
});

for (const [name, manifest, code] of [
  ['that is no JSON', 'format: 1', 'malformed-message'],
  ['that is no object', 'null', 'bundle-invalid'],
  ['of a newer format', manifestOf({ format: 2 }), 'bundle-invalid'],
  ['without graphs for this runtime', manifestOf({ graphs: { litert: { train: 'train.tflite' } } }), 'bundle-invalid'],
  ['that lacks a file of its graphs', manifestOf({ graphs: { onnx: { train: 'other.onnx' } } }), 'bundle-invalid'],
  ['whose files are named like paths', manifestOf({}, { ...FILES, '../key.pem': Buffer.from('x') }), 'bundle-invalid'],
  ['with an odd digest', manifestOf({ files: { ...manifestOf().files, odd: ['../../key.pem', 3] } }), 'bundle-invalid'],
  ['of other weights', manifestOf({ trainable: [['p_v', 'float32', [2]]] }), 'weights-mismatch'],
  ['of weights of another shape', manifestOf({ frozen: [['p_w', 'float32', [1, 2]]] }), 'weights-mismatch'],
]) {
  test(`a manifest ${name} is refused`, async () => {
    const { shelf, release } = shelfOf(manifest);
    await assert.rejects(shelf.bundle(ort, release), { code });
  });
}
