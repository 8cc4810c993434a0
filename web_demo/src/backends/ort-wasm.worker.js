import * as ort from "onnxruntime-web/wasm";
import { make } from "./ort.js";
import { serve } from "./serve.js";

serve(make(ort, "wasm"));
