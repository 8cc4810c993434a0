import * as ort from "onnxruntime-web/webgpu";
import { make } from "./ort.js";
import { serve } from "./serve.js";

serve(make(ort, "webgpu"));
