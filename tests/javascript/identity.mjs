// Who a device is: its enrolment code, its key, its certificate request, and the id that follows from its key.

import { createHash, createPrivateKey, createPublicKey, generateKeyPairSync, sign } from 'node:crypto';

import { malformed } from './errors.mjs';

const PREFIX = 'umbel-enrol-1.';

export const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest();

// What stands in a code: where to enrol, the token, and the authority to pin before the first byte is sent.
export function readCode(text) {
  const code = text.trim();
  try {
    if (!code.startsWith(PREFIX)) throw new Error('it has another beginning');
    const { server, token, authority } = JSON.parse(Buffer.from(code.slice(PREFIX.length), 'base64url').toString());
    const isWhole = [server, token, authority].every((part) => typeof part === 'string' && part);
    if (!isWhole) throw new Error('a part is missing');
    return { server, token, authority };
  } catch (error) {
    throw malformed(`this isn't an enrolment code: ${error.message}`);
  }
}

// A fresh EC P-256 key, as PEM. It never leaves the device.
export function makeKey() {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  return privateKey.export({ type: 'pkcs8', format: 'pem' });
}

const publicBytes = (pem) => createPublicKey(pem).export({ type: 'spki', format: 'der' });

export const deviceId = (pem) => sha256(publicBytes(pem)).toString('hex').slice(0, 32);

// DER is tag, length, content; lengths of 128 to 255, the longest there are here, take a second byte.
function der(tag, ...contents) {
  const content = Buffer.concat(contents);
  const length = content.length < 128 ? [content.length] : [0x81, content.length];
  return Buffer.concat([Buffer.of(tag, ...length), content]);
}

const SEQUENCE = 0x30;
const ECDSA_WITH_SHA256 = der(SEQUENCE, Buffer.from('06082a8648ce3d040302', 'hex'));

// A PKCS #10 request (RFC 2986) for the key, with an empty subject: the coordinator derives the id from the key anyway.
// node:crypto makes both parts that are hard, the public key's encoding and the signature; a library of twenty packages
// for the four brackets around them would be the larger risk.
export function certificateRequest(pem) {
  const version = Buffer.of(0x02, 1, 0);
  const noSubject = der(SEQUENCE);
  const noAttributes = der(0xa0);
  const asked = der(SEQUENCE, version, noSubject, publicBytes(pem), noAttributes);
  const signature = sign('sha256', asked, createPrivateKey(pem));
  return der(SEQUENCE, asked, ECDSA_WITH_SHA256, der(0x03, Buffer.of(0), signature));
}

// Raw Ed25519 and X25519 keys travel as 32 bytes; node:crypto takes them as JWK.
const okp = (curve, raw) => ({ kty: 'OKP', crv: curve, x: Buffer.from(raw).toString('base64url') });

export const ed25519PublicKey = (raw) => createPublicKey({ key: okp('Ed25519', raw), format: 'jwk' });

export const rawPublicKey = (pem) => Buffer.from(createPublicKey(pem).export({ format: 'jwk' }).x, 'base64url');

export function makeSigningKey() {
  return generateKeyPairSync('ed25519').privateKey.export({ type: 'pkcs8', format: 'pem' });
}

// The short name of a raw public key, by which messages refer to it.
export const keyId = (raw) => sha256(raw).toString('hex').slice(0, 16);
