// The secure sum's arithmetic: from a delta to a share, and from a share to a report that two parties open halves of.
//
// Layouts and names as in docs/reference/secure-sum.md. Nothing here decides whom to believe; that is private.mjs.

import { createCipheriv, randomBytes, randomFillSync, sign } from 'node:crypto';

import { keyId, rawPublicKey, sha256 } from './identity.mjs';
import { seal } from './sealing.mjs';
import { clipped, normOf } from './training.mjs';
import { encode, number } from './wire.mjs';

export const SECURE_SUM = 'umbel-2agg/1';
export const BLOCK = 4096;
const POINT = 2 ** 16;

const ascii = (text) => Buffer.from(text, 'latin1');
const label = (text) => ascii(`${SECURE_SUM}${text}\0`);

function u64(value) {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)));
  return bytes;
}

const counterMode = (key, counter, length) => createCipheriv('aes-256-ctr', key, counter).update(Buffer.alloc(length));

export const keyStream = (name, publicSeed, length) => (
  counterMode(sha256(label(`/${name}`), publicSeed), Buffer.alloc(16), length)
);

// How many numbers a share of this round holds.
export const numbersOf = ({ sent, rotated }) => (rotated ? Math.ceil(sent / BLOCK) * BLOCK : sent);

// The indices that travel: those with the smallest 64-bit words of the key stream, in rising order.
export function selection({ size, sent, public_seed }) {
  const indices = Uint32Array.from({ length: size }, (_, index) => index);
  if (sent === size) return indices;
  const stream = keyStream('selection', public_seed, 8 * size);
  const low = (index) => stream.readUInt32LE(8 * index);
  const high = (index) => stream.readUInt32LE(8 * index + 4);
  indices.sort((a, b) => high(a) - high(b) || low(a) - low(b) || a - b);
  return indices.subarray(0, sent).sort();
}

// In place: the numbers of one block as a 64 x 64 matrix X in row order become H X H. In Sylvester's order H ⊗ H is
// the Hadamard matrix of 4,096, so it is one fast transform over all of them.
function hadamard(block) {
  for (let half = 1; half < BLOCK; half *= 2) {
    for (let start = 0; start < BLOCK; start += 2 * half) {
      for (let at = start; at < start + half; at += 1) {
        const [a, b] = [block[at], block[at + half]];
        block[at] = a + b;
        block[at + half] = a - b;
      }
    }
  }
  for (let at = 0; at < BLOCK; at += 1) block[at] /= 64;
}

// Block j takes the numbers j, j + B, j + 2B, … of the padded vector; the B blocks follow one another in what comes out.
export function rotate(vector, publicSeed) {
  const signs = keyStream('signs', publicSeed, Math.ceil(vector.length / 8));
  const count = Math.ceil(vector.length / BLOCK);
  const turned = new Float64Array(count * BLOCK);
  vector.forEach((value, at) => {
    const isNegative = (signs[at >> 3] >> (at & 7)) & 1;
    turned[(at % count) * BLOCK + Math.floor(at / count)] = isNegative ? -value : value;
  });
  for (let start = 0; start < turned.length; start += BLOCK) hadamard(turned.subarray(start, start + BLOCK));
  return turned;
}

// The numbers that travel, before they are rounded.
export function travelling(round, delta) {
  const short = clipped(delta, round.clip_norm);
  const chosen = Float64Array.from(selection(round), (index) => short[index]);
  return round.rotated ? rotate(chosen, round.public_seed) : chosen;
}

// 53 random bits a number, from the system's generator.
function fractions(count) {
  const words = randomFillSync(new Uint32Array(2 * count));
  return (at) => (words[2 * at] * 2 ** 21 + (words[2 * at + 1] >>> 11)) / 2 ** 53;
}

// Each number rounded up with the probability of its fraction, so that the sum is right on average; modulo 2^k by the
// array's type.
function roundedOnce(values, factor, most, ring) {
  const chance = fractions(values.length);
  let squares = 0;
  values.forEach((value, at) => {
    const scaled = value * factor;
    const down = Math.floor(scaled);
    const whole = Math.max(-most, Math.min(most, down + (chance(at) < scaled - down ? 1 : 0)));
    squares += whole * whole;
    ring[at] = whole;
  });
  return Math.sqrt(squares);
}

// The norm that a rounded vector may have where the helper adds noise (Kairouz, Liu and Steinke 2021, proposition 22).
export function boundOf({ clip_norm, scale }, weight, count) {
  const norm = clip_norm * weight * scale;
  return Math.min(Math.sqrt(norm ** 2 + count / 4 + norm + Math.sqrt(count) / 2), norm + Math.sqrt(count));
}

// Noise is measured against the bound, so it has to hold: round again until it does. What never fits counts as nothing.
function rounded(round, values, weight) {
  const ring = round.ring_bits === 16 ? new Uint16Array(values.length) : new Uint32Array(values.length);
  const bound = round.noise_variance ? boundOf(round, weight, values.length) : Infinity;
  for (let tries = 0; tries < 64; tries += 1) {
    if (roundedOnce(values, round.scale * weight, round.level * weight, ring) <= bound) return ring;
  }
  return ring.fill(0);
}

// Each lane in units of 2^-16, in the descriptor's order; a metric that this device hasn't measured counts as 0.
function lanesOf({ lanes, clip_norm }, metrics, norm) {
  const measured = (name) => number(metrics[name] ?? 0, name);
  const bins = binsOf(lanes, measured);
  return lanes.map(({ name, bound }) => {
    if (name === 'within_clip') return norm <= clip_norm ? POINT / 2 : -POINT / 2;
    if (bins.has(name)) return bins.get(name);
    const most = Math.floor(bound * POINT);
    return Math.round(Math.max(-most, Math.min(most, measured(name) * POINT)));
  });
}

// The bins of a histogram (`age[0]`, `age[1]`, …) by name: one device moves them by `bound` together.
function binsOf(lanes, measured) {
  const stemOf = ({ name }) => /^(.*)\[\d+\]$/s.exec(name)?.[1];
  const found = new Map();
  for (const stem of new Set(lanes.map(stemOf).filter((one) => one !== undefined))) {
    const members = lanes.filter((lane) => stemOf(lane) === stem);
    const counts = members.map(({ name }) => Math.max(0, measured(name)));
    const most = Math.max(...members.map(({ bound }) => bound));
    const share = most / Math.max(most, counts.reduce((sum, count) => sum + count, 0));
    members.forEach(({ name }, at) => found.set(name, Math.floor(counts[at] * share * POINT)));
  }
  return found;
}

// One device's share in the clear: the words of 64 bits, and the numbers of k bits.
export function encodeShare(round, delta, weight, metrics) {
  const words = BigInt64Array.from([weight, ...lanesOf(round, metrics, normOf(delta))], BigInt);
  return { words, numbers: rounded(round, travelling(round, delta), weight) };
}

const bytesOf = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);

export const headOf = (rd, reportId) => Buffer.concat([label(''), rd, reportId]);

// Subtracts the mask, word by word; the arrays' types do it modulo 2^64 and 2^k.
export function masked({ words, numbers }, seed, head) {
  const counter = Buffer.concat([sha256(label('/mask'), head).subarray(0, 8), Buffer.alloc(8)]);
  const stream = counterMode(seed, counter, words.byteLength + numbers.byteLength);
  const mask = stream.buffer.slice(stream.byteOffset, stream.byteOffset + stream.length);
  const wordMask = new BigInt64Array(mask, 0, words.length);
  const numberMask = new numbers.constructor(mask, words.byteLength, numbers.length);
  const hidden = [words.map((word, at) => word - wordMask[at]), numbers.map((value, at) => value - numberMask[at])];
  return Buffer.concat(hidden.map(bytesOf));
}

// The leader's half: what only the content key opens, bound to the helper's half.
export function sealBody(contentKey, head, helperCapsule, hidden) {
  const cipher = createCipheriv('aes-256-gcm', contentKey, Buffer.alloc(12));
  cipher.setAAD(Buffer.concat([head, sha256(helperCapsule)]));
  return Buffer.concat([cipher.update(hidden), cipher.final(), cipher.getAuthTag()]);
}

// Both halves in one report. Fresh secrets each time: the key, the seed and the capsules are used for one report only.
export async function sealReport({ round, rd }, participant, reportId, share) {
  const head = headOf(rd, reportId);
  const [contentKey, seed] = [randomBytes(32), randomBytes(32)];
  const commitment = sha256(label('/commitment'), contentKey, head);
  const { key, certificate } = participant;
  const signature = sign(null, Buffer.concat([ascii('report\0'), head, commitment]), key);
  const forHelper = Buffer.concat([
    seed, commitment, rawPublicKey(key), u64(certificate.not_after_ms), certificate.signature, signature,
  ]);
  const infoFor = (party, key) => Buffer.concat([head, ascii(`${party}\0`), ascii(keyId(key))]);
  const [helperKey] = round.helper_keys;
  const helperCapsule = await seal(helperKey, infoFor('helper', helperKey), forHelper);
  const leaderCapsule = await seal(round.leader_key, infoFor('leader', round.leader_key), contentKey);
  const header = encode('ReportHeader', {
    suite: SECURE_SUM, rd, report_id: reportId, leader_capsule: leaderCapsule, helper_capsules: [helperCapsule],
  });
  const length = Buffer.alloc(4);
  length.writeUInt32LE(header.length);
  return Buffer.concat([length, header, sealBody(contentKey, head, helperCapsule, masked(share, seed, head))]);
}
